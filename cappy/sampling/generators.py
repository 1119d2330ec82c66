"""What a generator is, how an endpoint among them is asked, and what those that draw here have in common.

Nothing here opens a connection or loads a model.
"""

import hashlib
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from cappy.errors import ConfigError, quote
from cappy.records import Candidate
from cappy.records.instance import Status
from cappy.sampling.store import DRAWING_VERSION, CandidateStore, Origin, sample_key
from cappy.sampling.strategies import Decoding, decodings_of
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
    max_total_requests: int = 0
    max_total_tokens: int = 0
    max_total_cost: float = 0.0
    price_input: float = 0.0
    price_output: float = 0.0
    timeout: float = 120.0
    max_retries: int = 8
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
class PaidGenerator(Protocol):
    """A generator whose answers cost money or time elsewhere."""

    @property
    def usage(self) -> Usage:
        """What was used so far."""


def estimate_tokens(text: str) -> int:
    """About how many tokens a text has, by the rule of thumb."""
    return math.ceil(len(text) / CHARACTERS_PER_TOKEN)


class OnCandidates(Protocol):
    """Called by a generator as candidates come."""

    def __call__(self, candidates: int, /, *, in_progress: float = 0.0) -> None:
        """So many more are complete; those under way are `in_progress` candidates' worth of work, for an estimate."""


def ignore_progress(candidates: int, /, *, in_progress: float = 0.0) -> None:
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
        on_candidates: OnCandidates = ignore_progress,
    ) -> list[list[Candidate]]:
        """The candidates of all decodings, in their order, per instruction; `on_candidates` hears of them as they come.

        What is drawn for an instruction depends on the seed, the instruction and the decoding, not on the instructions
        beside it.
        """

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, int]] | None:
        """(sum of log-probabilities, number of tokens) of each given response, end token included; None if unknown."""

    def take_counts(self) -> Mapping[str, int]:
        """Counts for the manifest of what the candidates since the last call took; forgets them."""

    def close(self) -> None:
        """Lets go of what it holds open; it is not used after that."""


@dataclass(frozen=True, slots=True)
class SampleRange:
    """What is to be drawn of a decoding: `decoding.num_samples` samples from number `first` on.

    `position` is the place of the whole decoding among those that were asked for.
    """

    decoding: Decoding
    first: int = 0
    position: int = 0


class LocalGenerator(ABC):
    """A generator that draws here and, once `use_store` was called, draws nothing that it has drawn before.

    A kept draw is used as it is. What would be drawn anew may differ from it where the batch decides: logits of
    another batch differ in their last bits, and where two tokens are as good as equal, or a draw falls on the border
    of two, that turns the choice. Batches follow from what is drawn together: the rows of a part and their decodings.
    """

    name: str
    revision: str

    def __init__(self, name: str, revision: str) -> None:
        self.name = name
        self.revision = revision
        self._num_truncated = 0
        self._store: CandidateStore | None = None

    def use_store(self, work: Path) -> None:
        """Keeps what is drawn under this work folder, and uses what was kept there."""
        self._store = CandidateStore(work, Origin(generator=self.name, revision=self.revision, version=DRAWING_VERSION))

    def take_counts(self) -> Mapping[str, int]:
        """`cut`: the instructions since the last call that lost their end."""
        cut, self._num_truncated = self._num_truncated, 0
        return {"cut": cut}

    def close(self) -> None:
        """Closes what is kept."""
        if self._store is not None:
            self._store.close()

    def check(self, decodings: Sequence[Decoding]) -> None:
        """No decoding is refused."""
        del decodings

    def sample(
        self,
        instructions: Sequence[str],
        decodings: Sequence[Decoding],
        *,
        seed: int,
        on_candidates: OnCandidates = ignore_progress,
    ) -> list[list[Candidate]]:
        """The candidates of all decodings, in their order, per instruction, with likelihoods.

        Of equal instructions one is drawn for.
        """
        self.check(decodings)
        prompts = self._prompts(instructions, max((one.max_new_tokens for one in decodings), default=0))
        keys = [
            [self._key(sample_key(instruction=text, prompt=prompt, seed=seed), decoding) for decoding in decodings]
            for text, prompt in zip(instructions, prompts, strict=True)
        ]
        known = self._store.get(list(dict.fromkeys(itertools.chain(*keys)))) if self._store else {}
        missing = _missing_samples(keys, decodings, known)
        drawn_now = sum(len(places) * sum(one.decoding.num_samples for one in own) for own, places in missing.items())
        if others := len(instructions) * sum(decoding.num_samples for decoding in decodings) - drawn_now:
            on_candidates(others)
        for wanted, places in missing.items():
            texts, rows = [instructions[place] for place in places], [prompts[place] for place in places]
            for batch in self._draw(texts, rows, wanted, seed=seed, on_candidates=on_candidates):
                sets = {
                    (key := keys[places[number]][one.position]): (*known.get(key, ()), *candidates)
                    for number, drawn in batch.items()
                    for one, candidates in zip(wanted, drawn, strict=True)
                }
                if self._store is not None:
                    self._store.put(sets)
                known |= sets
        return [
            [
                candidate
                for key, decoding in zip(own, decodings, strict=True)
                for candidate in known[key][: decoding.num_samples]
            ]
            for own in keys
        ]

    @abstractmethod
    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, int]] | None:
        """As a `Generator`'s."""

    @abstractmethod
    def _prompts(self, instructions: Sequence[str], reserved: int) -> list[list[int]]:
        """Tokens of each instruction as the LLM sees it, cut so that `reserved` more have their place; counts those."""

    @abstractmethod
    def _draw(
        self,
        instructions: Sequence[str],
        prompts: Sequence[Sequence[int]],
        wanted: Sequence[SampleRange],
        *,
        seed: int,
        on_candidates: OnCandidates,
    ) -> Iterator[dict[int, list[list[Candidate]]]]:
        """As they come, places of prompts with their candidates of all that is wanted."""

    @staticmethod
    def _grows(decoding: Decoding) -> bool:
        """Whether more samples of it begin with the same ones, so that the others can be drawn alone."""
        del decoding
        return False

    def _key(self, question: str, decoding: Decoding) -> str:
        knobs = asdict(decoding)
        # Which of several generators draws it changes nothing.
        del knobs["generator"]
        if self._grows(decoding):
            del knobs["num_samples"]
        return sample_key(question=question, decoding=knobs)


def _missing_samples(
    keys: Sequence[Sequence[str]], decodings: Sequence[Decoding], known: Mapping[str, Sequence[Candidate]]
) -> dict[tuple[SampleRange, ...], list[int]]:
    """Which places lack which samples; each key is asked for once."""
    missing: dict[tuple[SampleRange, ...], list[int]] = {}
    asked: set[str] = set()
    for place, own in enumerate(keys):
        wanted = []
        for position, (key, decoding) in enumerate(zip(own, decodings, strict=True)):
            first = len(known.get(key, ()))
            if first < decoding.num_samples and key not in asked:
                asked.add(key)
                rest = replace(decoding, num_samples=decoding.num_samples - first)
                wanted.append(SampleRange(rest, first, position))
        if wanted:
            missing.setdefault(tuple(wanted), []).append(place)
    return missing


def response_status(text: str, *, ended: bool) -> Status:
    """The status of a local LLM's response: `ended` says whether the LLM ended it, or the limit of tokens did."""
    if not text:
        return "empty"
    return "ok" if ended else "truncated"


def check_strategy(specs: Sequence[str], decodings: Sequence[Decoding]) -> None:
    """ConfigError for what can be known to fail before anything is loaded."""
    for position, text in enumerate(specs):
        if parse_spec(text).kind == "vllm":
            reject_beams(text, decodings_of(decodings, position))
    twice = next((text for text in specs if specs.count(text) > 1), None)
    if twice:
        raise ConfigError(f"sampling: --generator {quote(twice)} stands twice, and would draw the same again; drop one")
    needed = max((decoding.generator + 1 for decoding in decodings if decoding.generator is not None), default=0)
    idle = next(
        (text for position, text in enumerate(specs) if decodings and not decodings_of(decodings, position)), None
    )
    if idle and needed <= len(specs):
        raise ConfigError(
            f"sampling: --strategy leaves --generator {quote(idle)} without a decoding; it is for {needed} generators"
        )
    if specs and needed > len(specs):
        raise ConfigError(
            f"sampling: --strategy is for {needed} generators, got {len(specs)}; name each with --generator"
        )


def reject_beams(name: str, decodings: Sequence[Decoding]) -> None:
    """ConfigError for a decoding by beams, which vLLM does not do here."""
    beams = next((decoding for decoding in decodings if decoding.num_beams > 1), None)
    if beams:
        raise ConfigError(f"{name}: vLLM does no beams here ({beams.name}); choose a --strategy without, as greedy")


def generator_seed(seed: int, generator: str) -> int:
    """The seed of one generator of a run, below 2^31."""
    digest = hashlib.blake2b(repr((seed, generator)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFF_FFFF
