"""What paying for answers needs beside the answers: the terms, and what was used so far.

Nothing here opens a connection or imports a client.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

Api = Literal["chat", "completions"]
CHARACTERS_PER_TOKEN = 4
"""Rule of thumb for English under current tokenizers; other scripts take more tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
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
