"""How many candidates to sample next, given the scores so far and the limits on tokens and cost.

The value of one more candidate is the expected improvement of the maximum. The scores of one request are modelled as
draws from a normal distribution with unknown mean and variance; under the usual flat prior the next one, given m scores
with mean x and sample standard deviation s, follows a Student t with v = m - 1 degrees of freedom, location x and scale
t = s * sqrt(1 + 1/m) (Gelman et al., Bayesian Data Analysis, 3rd ed., section 3.2). With z = (best - x) / t, density f
and distribution F of the standard t,

    gain = t * ((v + z^2) / (v - 1) * f(z) - z * (1 - F(z))),

the expected improvement of Jones, Schonlau and Welch (1998, eq. 15), with a t instead of a normal distribution.
Sampling stops when the gain is below the minimum gain (Weitzman 1979: continue while the expected improvement exceeds
the cost).
For fewer than three scores the expectation is not finite, so sampling continues. The estimate is biased towards
sampling: for normal scores it is on average 2.3 times the true gain after 3 scores, 1.7 times after 4, 1.3 after 8 and
1.2 after 16 (60,000 simulated requests each).
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
"""Maximum number of fields of a usage that are kept; servers send about ten."""
MAX_USAGE_DEPTH = 3
MAX_USAGE_NAME = 64
_REQUIRED_FIELDS = ("prompt_tokens", "completion_tokens", "total_tokens")
EXPECTED_TOKENS = 256
"""Assumed length of a response if the client sets no limit and there is no response yet."""

MIN_TOKENS = 16
"""Minimum tokens of a first response: a shorter one would be useless, so it is not requested."""


@dataclass(frozen=True)
class SamplingDecision:
    """How many candidates to sample next; if 0, `stop` is the reason."""

    count: int
    stop: Stop | None = None


def expected_gain(scores: Sequence[float], best: float | None = None) -> float:
    """Expected improvement of the best score by one more sample, in the scores' units, at least 0.

    `best` is the best score so far, by default the highest of `scores`; it is higher if the greedy response, which no
    further sample resembles, is the best one. Infinite for fewer than three scores; 0 if all are equal and one of them
    is the best. See the module's docstring for the formula.
    """
    count = len(scores)
    if count < 3:
        return math.inf
    scale = statistics.stdev(scores) * math.sqrt(1 + 1 / count)
    if scale == 0:
        return 0.0
    degrees = count - 1
    z = ((max(scores) if best is None else best) - statistics.fmean(scores)) / scale
    tail = float(stdtr(degrees, -z))
    gain = scale * ((degrees + z * z) / (degrees - 1) * _density(z, degrees) - z * tail)
    return max(0.0, gain)


def decide(
    policy: Policy,
    scores: Sequence[float],
    *,
    gain: float | None = None,
    num_requested: int,
    num_received: int,
    min_candidates: int,
    max_candidates: int,
) -> SamplingDecision:
    """Decides whether to continue after `num_requested` candidates were requested and `num_received` received.

    `scores` are those of the candidates that could be scored, and `gain` is the expected gain of one more sample, by
    default that of the scores. At least `min_candidates` are sampled if possible, and at
    most `max_candidates` are requested.
    """
    if num_requested >= max_candidates:
        return SamplingDecision(0, "candidates")
    if num_received >= min_candidates and scores:
        if policy.threshold is not None and max(scores) >= policy.threshold:
            return SamplingDecision(0, "threshold")
        if (expected_gain(scores) if gain is None else gain) < policy.min_gain:
            return SamplingDecision(0, "gain")
    return SamplingDecision(min(max(policy.round_size, min_candidates - num_received), max_candidates - num_requested))


def _density(z: float, degrees: int) -> float:
    """Density of the standard Student t distribution."""
    log = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(degrees * math.pi)
    return math.exp(log - (degrees + 1) / 2 * math.log1p(z * z / degrees))


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Prices per million tokens."""

    input: float = 0.0
    output: float = 0.0

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """The cost of these tokens."""
        return (prompt_tokens * self.input + completion_tokens * self.output) / 1e6


@dataclass(frozen=True)
class RemainingBudget:
    """The remainder of one limit, in response tokens or in money."""

    limit: Limit
    left: float


@dataclass(frozen=True)
class Allowance:
    """How many candidates may be requested, each with at most `max_tokens` (None: no limit).

    `limit` is the limit that determines these numbers, if any.
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
    """Allows up to `max_count` candidates with at least `min_tokens` each.

    If there is no candidate yet (`first`), one with fewer is allowed: at least `MIN_TOKENS`, or `min_tokens` if lower.
    """
    for count in range(max_count, 0, -1):
        tokens, limit = _max_tokens_each(count, budgets, prices, prompt_tokens)
        if tokens >= min_tokens:
            return Allowance(count, None if math.isinf(tokens) else int(tokens), limit)
    tokens, limit = _max_tokens_each(1, budgets, prices, prompt_tokens)
    return Allowance(int(first and tokens >= min(min_tokens, MIN_TOKENS)), max(0, int(tokens)), limit)


@dataclass
class TotalCost:
    """Cost of all requests since the start (`spent`), and the maximum cost of open calls (`reserved`)."""

    spent: float = 0.0
    reserved: float = 0.0


@dataclass
class Ledger:
    """Usage of one request: tokens and cost that were reported, and calls without a report."""

    limits: SpendingLimits
    total_cost: TotalCost
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    calls: int = 0
    failed: int = 0
    unmetered: int = 0
    charged: float = 0.0
    """Cost, including the maximum cost of calls without a report."""
    usages: list[dict[str, object]] = field(default_factory=list)

    def budgets(self) -> list[RemainingBudget]:
        """The remainder of each limit that is set."""
        limits, budgets = self.limits, []
        if limits.max_tokens:
            budgets.append(RemainingBudget("tokens", limits.max_tokens - self.completion_tokens))
        if limits.max_cost:
            budgets.append(RemainingBudget("money", limits.max_cost - self.charged))
        if limits.max_total_cost:
            budgets.append(
                RemainingBudget("total-money", limits.max_total_cost - self.total_cost.spent - self.total_cost.reserved)
            )
        return budgets

    def reserve(self, max_cost: float) -> None:
        """Reserves the maximum cost of a call until it is settled."""
        self.calls += 1
        self.total_cost.reserved += max_cost

    def settle(self, max_cost: float, prompt_tokens: int, completion_tokens: int, cost: float) -> None:
        """Counts the usage of a call and ends its reservation."""
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
        self.cost += cost
        self._charge(max_cost, cost)

    def fail(self, max_cost: float, *, may_be_billed: bool) -> None:
        """Counts a failed call; one that may be billed is charged with its maximum cost."""
        self.failed += 1
        self.unmetered += may_be_billed
        self._charge(max_cost, max_cost if may_be_billed else 0.0)

    def uncount_call(self) -> None:
        """Removes a failed call that only showed which parameter a model does not accept."""
        self.calls -= 1
        self.failed -= 1

    def _charge(self, max_cost: float, cost: float) -> None:
        self.charged += cost
        self.total_cost.reserved -= max_cost
        self.total_cost.spent += cost


class Usage(NamedTuple):
    """Tokens of a prompt and of its responses, and all of the server's counts by name, nested as in its response."""

    prompt: int
    completion: int
    counts: dict[str, object]


def read_usage(values: object) -> Usage | None:
    """Reads the integers from 0 to 2**53 in a server's usage, down to `MAX_USAGE_DEPTH`.

    Returns None if the tokens of prompt or response are missing.
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
    """Maximum tokens of each of `count` responses, and the limit that determines it."""
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
