"""What a generator is, how an endpoint among them is asked, and which decodings fit; imports no client, no model."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from cappy.errors import ConfigError, shown
from cappy.records import Candidate
from cappy.records.instance import Status
from cappy.sampling.strategies import Decoding, share
from cappy.specs import parse_spec

Api = Literal["chat", "completions"]
CHARACTERS_PER_TOKEN = 4
"""Rule of thumb for English under current tokenizers; other scripts take more tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointConfig:
    """How an endpoint is asked and what it may take; 0 means no limit, prices are money per million tokens.

    `folder` keeps the answers (None keeps them in memory alone), `run` names whose budget is spent. `extra` names knobs
    beyond OpenAI's that the server takes; `logprobs` asks for log-probabilities. An attempt may last `timeout` seconds;
    a request that fails is sent again `retries` times, first after `first_wait` seconds, then after twice as long each
    time. With `all_may_fail` refusals of every request end no run.
    """

    api: Api = "chat"
    extra: tuple[str, ...] = ()
    logprobs: bool = True
    all_may_fail: bool = False
    concurrency: int = 8
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    budget_requests: int = 0
    budget_tokens: int = 0
    budget_money: float = 0.0
    price_input: float = 0.0
    price_output: float = 0.0
    timeout: float = 120.0
    retries: int = 8
    first_wait: float = 0.5
    folder: Path | None = None
    run: str = ""

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        """What that many tokens cost."""
        return (input_tokens * self.price_input + output_tokens * self.price_output) / 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a generator did since it was loaded.

    `requests`, the tokens and `cost` count what was paid for; `cached` candidates came from earlier answers. `errors`
    are attempts that failed, each followed by another or by the end of the run.
    """

    candidates: int = 0
    cached: int = 0
    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    errors: int = 0
    cost: float = 0.0


@runtime_checkable
class Paid(Protocol):
    """A generator whose answers cost money or time elsewhere."""

    @property
    def usage(self) -> Usage:
        """What was used so far."""


def tokens_of(text: str) -> int:
    """About how many tokens a text has, by the rule of thumb."""
    return math.ceil(len(text) / CHARACTERS_PER_TOKEN)


class OnDrawn(Protocol):
    """Called by a generator as candidates come."""

    def __call__(self, candidates: int, /, *, begun: float = 0.0) -> None:
        """So many more are complete; those under way are `begun` candidates' worth of work, for an estimate."""


def ignore_drawn(candidates: int, /, *, begun: float = 0.0) -> None:
    """Nobody counts the candidates."""


class Generator(Protocol):
    """An LLM that samples candidates.

    `name` is its spec and `revision` pins its weights (a hash or a commit; for an endpoint the model's own name).
    """

    name: str
    revision: str

    def check(self, decodings: Sequence[Decoding]) -> None:
        """ConfigError for a decoding that it cannot do, before anything is drawn."""

    def sample(
        self,
        instructions: Sequence[str],
        decodings: Sequence[Decoding],
        *,
        seed: int,
        on_drawn: OnDrawn = ignore_drawn,
    ) -> list[list[Candidate]]:
        """The candidates of all decodings, in their order, per instruction; `on_drawn` hears of them as they come.

        What is drawn for an instruction depends on the seed, the instruction and the decoding, not on the instructions
        beside it.
        """

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, int]] | None:
        """(sum of log-probabilities, number of tokens) of each given response, end token included; None if unknown."""

    def tally(self) -> Mapping[str, int]:
        """Counts for the manifest of what the candidates since the last call took; forgets them."""

    def close(self) -> None:
        """Lets go of what it holds open; it is not used after that."""


def status_of(text: str, *, ended: bool) -> Status:
    """The status of a local LLM's response: `ended` says whether the LLM ended it, or the limit of tokens did."""
    if not text:
        return "empty"
    return "ok" if ended else "truncated"


def check_strategy(specs: Sequence[str], decodings: Sequence[Decoding]) -> None:
    """ConfigError for what can be known to fail before anything is loaded."""
    for position, text in enumerate(specs):
        if parse_spec(text).kind == "vllm":
            refuse_beams(text, share(decodings, position))
    twice = next((text for text in specs if specs.count(text) > 1), None)
    if twice:
        raise ConfigError(f"sampling: --generator {shown(twice)} stands twice, and would draw the same again; drop one")
    needed = max((decoding.generator + 1 for decoding in decodings if decoding.generator is not None), default=0)
    idle = next((text for position, text in enumerate(specs) if decodings and not share(decodings, position)), None)
    if idle and needed <= len(specs):
        raise ConfigError(
            f"sampling: --strategy leaves --generator {shown(idle)} without a decoding; it is for {needed} generators"
        )
    if specs and needed > len(specs):
        raise ConfigError(
            f"sampling: --strategy is for {needed} generators, got {len(specs)}; name each with --generator"
        )


def refuse_beams(name: str, decodings: Sequence[Decoding]) -> None:
    """ConfigError for a decoding by beams, which vLLM does not do here."""
    beams = next((decoding for decoding in decodings if decoding.num_beams > 1), None)
    if beams:
        raise ConfigError(f"{name}: vLLM does no beams here ({beams.name}); choose a --strategy without, as greedy")


def seed_of(seed: int, generator: str) -> int:
    """The seed of one generator of a run, below 2^31."""
    digest = hashlib.blake2b(repr((seed, generator)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFF_FFFF
