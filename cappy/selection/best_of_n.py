"""Best-of-n: the label that a selector's pick is expected to have when n candidates of the pool had been sampled."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from cappy.selection.pools import Vector, mutual_rouge_l

MBR_DRAWS = 32
"""Orders of the pool that the MBR curve is averaged over, for each instance."""
WORTH = 0.001
"""What one more candidate must add to pay: 0.1 on the scale of 0 to 100, which is what a report prints."""


def ranked_curve(values: Vector, labels: Vector) -> Vector:
    """Expected label of the pick among n random candidates, for n from 1 to all; exact.

    For a selector whose value of a candidate does not depend on the other candidates. Of equal values each is picked as
    often.
    """
    order = np.argsort(-values, kind="stable")
    expected: Vector = best_probabilities(len(values)) @ averaged_ties(values[order], labels[order])
    return expected


def averaged_ties(ranked: Vector, labels: Vector) -> Vector:
    """The labels in the order of `ranked` values, those of equal values replaced by their mean.

    Which of equal values are drawn is by chance alone, so a pick among them is worth their mean, whatever n is.
    """
    tied = np.concatenate([[0], np.cumsum(np.diff(ranked) != 0)])
    means: Vector = (np.bincount(tied, weights=labels) / np.bincount(tied))[tied]
    return means


@lru_cache(maxsize=256)
def best_probabilities(size: int) -> npt.NDArray[np.float64]:
    """Row n - 1, column k: probability that the k-th best (from 0) of `size` is the best of n drawn ones.

    Drawn without replacement: C(size - 1 - k, n - 1) / C(size, n), by logarithms so that no binomial overflows.
    """
    n = np.arange(1, size + 1)[:, None]
    worse = size - 1 - np.arange(size)[None, :]
    possible = worse >= n - 1
    chosen = _log_binomial(np.where(possible, worse, n - 1), n - 1)
    table: npt.NDArray[np.float64] = np.where(possible, np.exp(chosen - _log_binomial(np.full_like(n, size), n)), 0.0)
    table.setflags(write=False)
    return table


def mbr_curve(responses: tuple[str, ...], labels: Vector, rng: np.random.Generator, draws: int = MBR_DRAWS) -> Vector:
    """Expected label of MBR's pick among n random candidates, for n from 1 to all, averaged over `draws` orders.

    MBR's values depend on which candidates are there, so each n is simulated: the first n of a random order. Of equal
    sums each candidate is picked as often. Of two candidates each is as near to the other, so that up to 2 the label is
    exactly that of a random one.
    """
    size = len(responses)
    similarity = mutual_rouge_l(responses)
    np.fill_diagonal(similarity, 0.0)
    absent = np.tril(np.full((size, size), -np.inf), -1)
    total = np.zeros(size)
    for _ in range(draws):
        order = rng.permutation(size)
        sums = np.cumsum(similarity[np.ix_(order, order)], axis=1) + absent
        # Sums that are equal but for their last bits count as equal.
        tied = sums >= sums.max(axis=0) - 1e-9
        total += labels[order] @ tied / tied.sum(axis=0)
    mean: Vector = total / draws
    mean[:2] = labels.mean()
    return mean


def pays_until(curve: Sequence[float]) -> int:
    """The number of candidates beyond which no further one adds `WORTH` or more; the curve's length if all pay."""
    gains = np.diff(np.asarray(curve))
    paying = np.flatnonzero(gains >= WORTH)
    return int(paying[-1]) + 2 if len(paying) else 1


def extended(curve: Vector, size: int) -> Vector:
    """The curve up to `size`: an instance with fewer candidates keeps the result of all it has."""
    return np.concatenate([curve, np.full(size - len(curve), curve[-1])])


def _log_binomial(n: npt.NDArray[np.int64], k: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    # Imported here: only an evaluation needs it, and every reader of a report imports this module.
    from scipy.special import gammaln

    logarithm: npt.NDArray[np.float64] = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    return logarithm
