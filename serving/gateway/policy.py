"""How many candidates to ask for next: by the scores seen so far, and by what limits on tokens and money leave.

Drawing one more candidate is worth the expected improvement of the maximum. Scores of one request are taken for draws
from a normal distribution of unknown mean and variance; under the usual flat prior the next one, given m scores with
mean x and sample standard deviation s, follows a Student t with v = m - 1 degrees of freedom, location x and scale
t = s * sqrt(1 + 1/m) (Gelman et al., Bayesian Data Analysis, 3rd ed., section 3.2). With z = (best - x) / t, density f
and distribution F of the standard t,

    gain = t * ((v + z^2) / (v - 1) * f(z) - z * (1 - F(z))),

the expected improvement of Jones, Schonlau and Welch (1998, eq. 15) with the t in place of the normal. Sampling stops
when the gain is below what a sample must bring (Weitzman 1979: search on while the expected improvement exceeds the
cost). Fewer than three scores give no finite expectation, so they never stop it. The estimate errs on the side of
sampling: for scores that are normal it is, in the mean, 2.3 times what another sample brings after 3 scores, 1.7 times
after 4, 1.3 after 8 and 1.2 after 16 (60,000 simulated requests each).
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, NamedTuple

from scipy.special import stdtr

from cappy.untrusted import is_count
from serving.gateway.config import Policy, SpendingLimits

Stop = Literal["threshold", "gain", "candidates", "temperature", "limit", "upstream"]
Limit = Literal["seconds", "tokens", "money", "total-money"]
MAX_USAGE_FIELDS = 32
"""Numbers of one usage that are kept; servers send about ten."""
MAX_USAGE_DEPTH = 3
MAX_USAGE_NAME = 64
_REQUIRED_FIELDS = ("prompt_tokens", "completion_tokens", "total_tokens")
EXPECTED_TOKENS = 256
"""Taken for the length of a response where the client sets no limit and none was seen."""

MIN_TOKENS = 16
"""A first response that could not be longer is of no use, so it is not asked for."""


@dataclass(frozen=True)
class Decision:
    """How many candidates to draw next; 0 with the reason to stop."""

    count: int
    stop: Stop | None = None


def expected_gain(scores: Sequence[float]) -> float:
    """How much one more sample is expected to raise the best score, in the scores' units, at least 0.

    Infinite for fewer than three scores, of which nothing is known; 0 where all are equal.
    """
    count = len(scores)
    if count < 3:
        return math.inf
    scale = statistics.stdev(scores) * math.sqrt(1 + 1 / count)
    if scale == 0:
        return 0.0
    degrees = count - 1
    z = (max(scores) - statistics.fmean(scores)) / scale
    tail = float(stdtr(degrees, -z))
    gain = scale * ((degrees + z * z) / (degrees - 1) * _density(z, degrees) - z * tail)
    return max(0.0, gain)


def decide(
    policy: Policy,
    scores: Sequence[float],
    *,
    num_requested: int,
    num_received: int,
    min_candidates: int,
    max_candidates: int,
) -> Decision:
    """What to do after `asked` requested candidates, of which `drawn` came and those that could be scored have scores.

    At least `wanted` are drawn where they can be, and never more than `most` are asked for.
    """
    if num_requested >= max_candidates:
        return Decision(0, "candidates")
    if num_received >= min_candidates and scores:
        if policy.threshold is not None and max(scores) >= policy.threshold:
            return Decision(0, "threshold")
        if expected_gain(scores) < policy.min_gain:
            return Decision(0, "gain")
    return Decision(min(max(policy.round_size, min_candidates - num_received), max_candidates - num_requested))


def _density(z: float, degrees: int) -> float:
    """Of the standard Student t."""
    log = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(degrees * math.pi)
    return math.exp(log - (degrees + 1) / 2 * math.log1p(z * z / degrees))


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Money per million tokens."""

    input: float = 0.0
    output: float = 0.0

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """What that many tokens cost."""
        return (prompt_tokens * self.input + completion_tokens * self.output) / 1e6


@dataclass(frozen=True)
class RemainingBudget:
    """What is left under one limit, in tokens of responses or in money."""

    limit: Limit
    left: float


@dataclass(frozen=True)
class Allowance:
    """How many candidates may be asked for, each at most `most_tokens` long (None: as long as it likes).

    `limit` is the one that gives these numbers, None where none does.
    """

    count: int
    max_tokens: int | None = None
    limit: Limit | None = None


def allow(
    max_count: int,
    budgets: Sequence[RemainingBudget],
    prices: Prices,
    *,
    prompt_tokens: int,
    min_tokens: int,
    first: bool,
) -> Allowance:
    """As many of the wanted candidates as leave each the `need`ed tokens; where it is the first, one may have fewer."""
    for count in range(max_count, 0, -1):
        tokens, limit = _max_tokens_each(count, budgets, prices, prompt_tokens)
        if tokens >= min_tokens:
            return Allowance(count, None if math.isinf(tokens) else int(tokens), limit)
    tokens, limit = _max_tokens_each(1, budgets, prices, prompt_tokens)
    return Allowance(int(first and tokens >= min(min_tokens, MIN_TOKENS)), max(0, int(tokens)), limit)


@dataclass
class Total:
    """What all requests have cost since the start, and what those under way may still cost."""

    spent: float = 0.0
    reserved: float = 0.0


@dataclass
class Ledger:
    """What one request has used: tokens and money that were counted, calls whose were not."""

    limits: SpendingLimits
    total: Total
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    calls: int = 0
    failed: int = 0
    unmetered: int = 0
    charged: float = 0.0
    """Cost, and what calls that were not counted may have cost at the most."""
    usages: list[dict[str, object]] = field(default_factory=list)

    def budgets(self) -> list[RemainingBudget]:
        """What is left under each limit that is set."""
        limits, budgets = self.limits, []
        if limits.max_tokens:
            budgets.append(RemainingBudget("tokens", limits.max_tokens - self.completion_tokens))
        if limits.max_cost:
            budgets.append(RemainingBudget("money", limits.max_cost - self.charged))
        if limits.max_total_cost:
            budgets.append(
                RemainingBudget("total-money", limits.max_total_cost - self.total.spent - self.total.reserved)
            )
        return budgets

    def reserve(self, max_cost: float) -> None:
        """Keeps the most that a call may cost from others until it is settled."""
        self.calls += 1
        self.total.reserved += max_cost

    def settle(self, max_cost: float, prompt_tokens: int, completion_tokens: int, cost: float) -> None:
        """Counts what a call has used."""
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
        self.cost += cost
        self._charge(max_cost, cost)

    def fail(self, max_cost: float, *, may_be_billed: bool) -> None:
        """Counts a call without an answer; one that may have been paid for is charged with the most."""
        self.failed += 1
        self.unmetered += may_be_billed
        self._charge(max_cost, max_cost if may_be_billed else 0.0)

    def withdraw(self) -> None:
        """Forgets a call that failed only to show what a model does not take."""
        self.calls -= 1
        self.failed -= 1

    def _charge(self, max_cost: float, cost: float) -> None:
        self.charged += cost
        self.total.reserved -= max_cost
        self.total.spent += cost


class Usage(NamedTuple):
    """Tokens of a prompt and of its responses, and all that a server counted, by name, at any depth."""

    prompt: int
    completion: int
    counts: dict[str, object]


def read_usage(values: object) -> Usage | None:
    """The whole numbers from 0 to 2**53 in a usage as a server sent it, at any place within `MAX_USAGE_DEPTH`.

    None where it does not say how many tokens of prompt and of response there were.
    """
    if not isinstance(values, dict):
        return None
    counts = _counts(values, MAX_USAGE_DEPTH)
    prompt, completion = counts.get("prompt_tokens"), counts.get("completion_tokens")
    return Usage(prompt, completion, counts) if is_count(prompt) and is_count(completion) else None


def _counts(values: dict[str, object], depth: int) -> dict[str, object]:
    counts: dict[str, object] = {}
    for name in [
        *_REQUIRED_FIELDS,
        *islice((name for name in values if name not in _REQUIRED_FIELDS), MAX_USAGE_FIELDS),
    ]:
        value = values.get(name)
        if is_count(value):
            counts[name[:MAX_USAGE_NAME]] = value
        elif isinstance(value, dict) and depth > 1:
            counts[name[:MAX_USAGE_NAME]] = _counts(value, depth - 1)
    return counts


def _max_tokens_each(
    count: int, budgets: Sequence[RemainingBudget], prices: Prices, prompt_tokens: int
) -> tuple[float, Limit | None]:
    """Tokens that each of `count` responses may have, and the limit that says so."""
    lowest: tuple[float, Limit | None] = (math.inf, None)
    for budget in budgets:
        share = budget.left / count
        if budget.limit != "tokens":
            share -= prices.cost(prompt_tokens, 0)
            share = share * 1e6 / prices.output if prices.output else (math.inf if share >= 0 else 0.0)
        lowest = min(
            lowest, (math.floor(share) if math.isfinite(share) else share, budget.limit), key=lambda pair: pair[0]
        )
    return lowest
