"""When to stop sampling: a pure function of the scores seen so far.

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
from dataclasses import dataclass
from typing import Literal

from scipy.special import stdtr

from cappy.errors import ConfigError

Stop = Literal["threshold", "gain", "candidates", "temperature", "limit", "upstream"]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How many candidates at most, how many in a round, and when fewer are enough.

    `threshold` stops at a score that is good enough (None: never), `min_gain` where another sample is expected to
    raise the best score by less (0: never). Below `floor` the answer is not given as it is (None: always given).
    """

    candidates: int = 8
    round_size: int = 4
    threshold: float | None = None
    min_gain: float = 0.01
    floor: float | None = None

    def __post_init__(self) -> None:
        for name in ("threshold", "min_gain", "floor"):
            if math.isnan(getattr(self, name) or 0.0):
                raise ConfigError(f"--{name.replace('_', '-')}: is no number; give one, or leave it out")
        if self.threshold is not None and self.floor is not None and self.floor > self.threshold:
            what = f"--floor {self.floor:g} is above --threshold {self.threshold:g}"
            raise ConfigError(f"{what}: an answer that is good enough would be refused; lower --floor")


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
    spread = statistics.stdev(scores) * math.sqrt(1 + 1 / count)
    if spread == 0:
        return 0.0
    freedom = count - 1
    z = (max(scores) - statistics.fmean(scores)) / spread
    tail = float(stdtr(freedom, -z))
    gain = spread * ((freedom + z * z) / (freedom - 1) * _density(z, freedom) - z * tail)
    return max(0.0, gain)


def decide(policy: Policy, scores: Sequence[float], *, asked: int, drawn: int, wanted: int, most: int) -> Decision:
    """What to do after `asked` requested candidates, of which `drawn` came and those that could be scored have scores.

    At least `wanted` are drawn where they can be, and never more than `most` are asked for.
    """
    if asked >= most:
        return Decision(0, "candidates")
    if drawn >= wanted and scores:
        if policy.threshold is not None and max(scores) >= policy.threshold:
            return Decision(0, "threshold")
        if expected_gain(scores) < policy.min_gain:
            return Decision(0, "gain")
    return Decision(min(max(policy.round_size, wanted - drawn), most - asked))


def _density(z: float, freedom: int) -> float:
    """Of the standard Student t."""
    log = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    return math.exp(log - (freedom + 1) / 2 * math.log1p(z * z / freedom))
