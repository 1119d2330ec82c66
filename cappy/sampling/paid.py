"""What paying for answers needs beside the answers: the terms, what was used so far, and what a run would take.

Nothing here opens a connection or imports a client.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from cappy.records import Candidate
from cappy.sampling.strategies import Decoding

Api = Literal["chat", "completions"]
CHARACTERS_PER_TOKEN = 4
"""Rule of thumb for English under current tokenizers; other scripts take more tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How an endpoint is asked and what it may take; 0 means no limit, prices are money per million tokens.

    `folder` keeps the answers (None keeps them in memory alone), `run` names whose budget is spent. `extra` names knobs
    beyond OpenAI's that the server takes. An attempt may last `timeout` seconds; a request that fails is sent again
    `retries` times, first after `first_wait` seconds, then after twice as long each time.
    """

    api: Api = "chat"
    extra: tuple[str, ...] = ()
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

    name: str

    @property
    def usage(self) -> Usage:
        """What was used so far."""

    def check(self, decodings: Sequence[Decoding]) -> None:
        """ConfigError for a decoding that it cannot do, before anything is asked."""

    def sample_all(
        self, instructions: Sequence[str], decodings: Sequence[Decoding], *, seed: int
    ) -> list[list[Candidate]]:
        """Candidates per instruction, decoding by decoding; what they are depends on no other instruction."""

    def tally(self) -> Mapping[str, int]:
        """What the candidates since the last call took, those from earlier answers included; forgets it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a run takes at most: one request per candidate, each response as long as it may be.

    An endpoint that takes `n` needs only `fewest_requests`. `minutes` is None without a limit per minute.
    """

    instances: int
    candidates: int
    requests: int
    fewest_requests: int
    input_tokens: int
    output_tokens: int
    cost: float
    minutes: float | None

    @property
    def text(self) -> str:
        """For a person, one line each."""
        requests = f"{self.requests:,}"
        if self.fewest_requests < self.requests:
            requests += f" ({self.fewest_requests:,} if the endpoint takes n)"
        minutes = "no limit per minute is set" if self.minutes is None else f"{self.minutes:,.1f} at the limits"
        lines = {
            "candidates": f"{self.candidates:,} for {self.instances:,} instances",
            "requests": requests,
            "tokens": f"{self.input_tokens:,} in, {self.output_tokens:,} out, at most "
            f"({CHARACTERS_PER_TOKEN} characters a token)",
            "minutes": minutes,
            "cost": f"{self.cost:,.2f} at most" if self.cost else "no price is set",
        }
        return "\n".join(f"{name:<11}{value}" for name, value in lines.items())


def tokens_of(text: str) -> int:
    """About how many tokens a text has, by the rule of thumb."""
    return math.ceil(len(text) / CHARACTERS_PER_TOKEN)


def estimate(instructions: Sequence[str], decodings: Sequence[Decoding], terms: Terms, *, llms: int = 1) -> Estimate:
    """What sampling these instructions from `llms` endpoints takes; nothing is asked.

    Instances with choices need no samples: leave their instructions out.
    """
    drawn = sum(decoding.num_samples for decoding in decodings) * llms
    longest = sum(decoding.num_samples * decoding.max_new_tokens for decoding in decodings) * llms
    requests = drawn * len(instructions)
    input_tokens = drawn * sum(tokens_of(instruction) for instruction in instructions)
    output_tokens = longest * len(instructions)
    rates = ((requests, terms.requests_per_minute), (input_tokens + output_tokens, terms.tokens_per_minute))
    # Each endpoint has the limits to itself, and they are asked one after the other.
    minutes = [amount / limit for amount, limit in rates if limit]
    return Estimate(
        instances=len(instructions),
        candidates=requests,
        requests=requests,
        fewest_requests=len(decodings) * llms * len(instructions),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cost=terms.cost(input_tokens, output_tokens),
        minutes=max(minutes) if minutes else None,
    )
