"""Limits on tokens and money: how many candidates may still be asked for, and how long each may be."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from cappy.errors import ConfigError
from cappy.untrusted import is_count

MAX_USAGE_FIELDS = 32
"""Numbers of one usage that are kept; servers send about ten."""
MAX_USAGE_DEPTH = 3
MAX_USAGE_NAME = 64
_NAMED = ("prompt_tokens", "completion_tokens", "total_tokens")
Limit = Literal["seconds", "tokens", "money", "total-money"]
EXPECTED_TOKENS = 256
"""Taken for the length of a response where the client sets no limit and none was seen."""

LEAST_TOKENS = 16
"""A first response that could not be longer is of no use, so it is not asked for."""


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Money per million tokens."""

    prompt: float = 0.0
    completion: float = 0.0

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """What that many tokens cost."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one request: seconds, completion tokens and money over all its candidates; of all requests: money.

    0 means no limit, but for `seconds`, which is always one.
    """

    seconds: float = 60.0
    tokens: int = 0
    money: float = 0.0
    total_money: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.seconds + self.money + self.total_money):
            raise ConfigError("--max-seconds, --max-cost and --max-total-cost must be finite; 0 is no limit on money")


@dataclass(frozen=True)
class Purse:
    """What is left under one limit, in tokens of responses or in money."""

    limit: Limit
    left: float


@dataclass(frozen=True)
class Allowance:
    """How many candidates may be asked for, each at most `most_tokens` long (None: as long as it likes).

    `limit` is the one that gives these numbers, None where none does.
    """

    count: int
    most_tokens: int | None = None
    limit: Limit | None = None


def allow(
    wanted: int,
    purses: Sequence[Purse],
    prices: Prices,
    *,
    prompt_tokens: int,
    need: int,
    first: bool,
) -> Allowance:
    """As many of the wanted candidates as leave each the `need`ed tokens; where it is the first, one may have fewer."""
    for count in range(wanted, 0, -1):
        most, limit = _each(count, purses, prices, prompt_tokens)
        if most >= need:
            return Allowance(count, None if math.isinf(most) else int(most), limit)
    most, limit = _each(1, purses, prices, prompt_tokens)
    return Allowance(int(first and most >= min(need, LEAST_TOKENS)), max(0, int(most)), limit)


@dataclass
class Total:
    """What all requests have cost since the start, and what those under way may still cost."""

    spent: float = 0.0
    held: float = 0.0


@dataclass
class Ledger:
    """What one request has used: tokens and money that were counted, calls whose were not."""

    limits: Limits
    total: Total
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    calls: int = 0
    failed: int = 0
    unmetered: int = 0
    charged: float = 0.0
    """Cost, and what calls that were not counted may have cost at the most."""
    usages: list[dict[str, Any]] = field(default_factory=list)

    def purses(self) -> list[Purse]:
        """What is left under each limit that is set."""
        limits, found = self.limits, []
        if limits.tokens:
            found.append(Purse("tokens", limits.tokens - self.completion_tokens))
        if limits.money:
            found.append(Purse("money", limits.money - self.charged))
        if limits.total_money:
            found.append(Purse("total-money", limits.total_money - self.total.spent - self.total.held))
        return found

    def hold(self, most: float) -> None:
        """Keeps the most that a call may cost from others until it is settled."""
        self.calls += 1
        self.total.held += most

    def settle(self, most: float, prompt_tokens: int, completion_tokens: int, cost: float) -> None:
        """Counts what a call has used."""
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
        self.cost += cost
        self._charge(most, cost)

    def fail(self, most: float, *, paid: bool) -> None:
        """Counts a call without an answer; one that may have been paid for is charged with the most."""
        self.failed += 1
        self.unmetered += paid
        self._charge(most, most if paid else 0.0)

    def withdraw(self) -> None:
        """Forgets a call that failed only to show what a model does not take."""
        self.calls -= 1
        self.failed -= 1

    def _charge(self, most: float, cost: float) -> None:
        self.charged += cost
        self.total.held -= most
        self.total.spent += cost


def read_usage(sent: object) -> dict[str, Any] | None:
    """The whole numbers from 0 to 2**53 in a usage as a server sent it, at any place within `MAX_USAGE_DEPTH`.

    None where it does not say how many tokens of prompt and of response there were.
    """
    if not isinstance(sent, dict):
        return None
    usage = _counts(sent, MAX_USAGE_DEPTH)
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return usage if is_count(prompt) and is_count(completion) else None


def _counts(sent: dict[str, Any], depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in [*_NAMED, *islice((name for name in sent if name not in _NAMED), MAX_USAGE_FIELDS)]:
        value = sent.get(name)
        if is_count(value):
            found[name[:MAX_USAGE_NAME]] = value
        elif isinstance(value, dict) and depth > 1:
            found[name[:MAX_USAGE_NAME]] = _counts(value, depth - 1)
    return found


def _each(count: int, purses: Sequence[Purse], prices: Prices, prompt_tokens: int) -> tuple[float, Limit | None]:
    """Tokens that each of `count` responses may have, and the limit that says so."""
    found: tuple[float, Limit | None] = (math.inf, None)
    for purse in purses:
        share = purse.left / count
        if purse.limit != "tokens":
            share -= prices.cost(prompt_tokens, 0)
            share = share * 1e6 / prices.completion if prices.completion else (math.inf if share >= 0 else 0.0)
        found = min(found, (math.floor(share) if math.isfinite(share) else share, purse.limit), key=lambda one: one[0])
    return found
