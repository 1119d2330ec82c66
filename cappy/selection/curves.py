"""Best-of-n curves: the expected label of a selector's pick when n candidates of a pool are sampled."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from cappy.selection.linear import MIN_SPREAD, TRUNCATED_PENALTY, PoolFeatures, Rule, Selector
from cappy.selection.pools import Vector, mutual_rouge_l

NUM_ORDERS = 32
"""Random orders of each pool that the curves of MBR and of the fitted selector are averaged over."""
TOLERANCE = 1e-9
"""Values that differ by less are equal: they differ by rounding only."""
MIN_GAIN = 0.001
"""Minimum gain that makes one more candidate worth sampling: 0.1 on the scale of 0 to 100 of a report."""


def best_of_n_curve(values: Vector, labels: Vector) -> Vector:
    """Exact expected label of the pick among n random candidates, for n from 1 to all: shape (candidates,).

    Only for selectors whose value of a candidate does not depend on the other candidates. Candidates with equal values
    are picked with equal probability.
    """
    order = np.argsort(-values, kind="stable")
    expected: Vector = best_probabilities(len(values)) @ average_ties(values[order], labels[order])
    return expected


def average_ties(ranked: Vector, labels: Vector) -> Vector:
    """The labels in the order of the `ranked` values, with labels of equal values replaced by their mean.

    Candidates with equal values are equally likely to be drawn, so for every n the expected label is their mean.
    """
    tied = np.concatenate([[0], np.cumsum(np.diff(ranked) != 0)])
    means: Vector = (np.bincount(tied, weights=labels) / np.bincount(tied))[tied]
    return means


@lru_cache(maxsize=256)
def best_probabilities(size: int) -> npt.NDArray[np.float64]:
    """Row n - 1, column k: the probability that the k-th best (from 0) of `size` candidates is the best of n draws.

    Candidates are drawn without replacement: C(size - 1 - k, n - 1) / C(size, n), computed by logarithms to avoid
    overflow.
    """
    n = np.arange(1, size + 1)[:, None]
    worse = size - 1 - np.arange(size)[None, :]
    possible = worse >= n - 1
    log_count = _log_binomial(np.where(possible, worse, n - 1), n - 1)
    table: npt.NDArray[np.float64] = np.where(
        possible, np.exp(log_count - _log_binomial(np.full_like(n, size), n)), 0.0
    )
    table.setflags(write=False)
    return table


def mbr_curve(
    responses: tuple[str, ...], labels: Vector, rng: np.random.Generator, num_orders: int = NUM_ORDERS
) -> Vector:
    """Expected label of MBR's pick among n random candidates, for n from 1 to all: shape (candidates,).

    MBR's values depend on the other candidates, so each n is simulated with the first n of a random order, and the
    result is averaged over `num_orders` orders. Candidates with equal sums are picked with equal probability. Two
    candidates are equally similar to each other, so for n up to 2 the value is exactly the mean label.
    """
    size = len(responses)
    similarity = mutual_rouge_l(responses)
    np.fill_diagonal(similarity, 0.0)
    # In column n - 1, the candidates after the first n are not in the pool.
    absent = np.tril(np.full((size, size), -np.inf), -1)
    total = np.zeros(size)
    for _ in range(num_orders):
        order = rng.permutation(size)
        sums = np.cumsum(similarity[np.ix_(order, order)], axis=1) + absent
        tied = sums >= sums.max(axis=0) - TOLERANCE
        total += labels[order] @ tied / tied.sum(axis=0)
    mean: Vector = total / num_orders
    mean[:2] = labels.mean()
    return mean


@dataclass(frozen=True)
class SampledPicks:
    """The picks of the fitted selector among the first n candidates of random orders, for n from 1 to all.

    `scores` and `labels` have the shape (orders, candidates): the scorer's score of the pick, and its label. For equal
    values, both are means over the candidates that share the highest one.
    """

    scores: npt.NDArray[np.float64]
    labels: npt.NDArray[np.float64]


def sample_picks(
    selector: Selector,
    pool: PoolFeatures,
    labels: Vector,
    rng: np.random.Generator,
    *,
    greedy_first: bool,
    num_orders: int = NUM_ORDERS,
) -> SampledPicks:
    """The selector's picks for `num_orders` random orders of the pool.

    With `greedy_first`, every order starts with the greedy response if it is known, as the gateway samples it.
    """
    picks = []
    for order, values in _values_by_order(selector.rule(pool.available), pool, rng, greedy_first, num_orders):
        shares = (values >= values.max(axis=0) - TOLERANCE).astype(np.float64)
        shares /= shares.sum(axis=0)
        picks.append((pool.scores[order] @ shares, labels[order] @ shares))
    return SampledPicks(np.stack([scores for scores, _ in picks]), np.stack([labels for _, labels in picks]))


def _values_by_order(
    rule: Rule, pool: PoolFeatures, rng: np.random.Generator, greedy_first: bool, num_orders: int
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]:
    """Yields random orders with the values of their first n candidates in column n - 1, -inf for the others."""
    size = len(pool.responses)
    weights = rule.used
    similarity = mutual_rouge_l(pool.responses) if "mbr" in weights else np.zeros((size, size))
    np.fill_diagonal(similarity, 0.0)
    counts, present = np.arange(1, size + 1), np.tri(size, dtype=bool).T
    complete = ~np.isin(np.arange(size), list(pool.truncated))
    fixed = {"score": pool.scores, "likelihood": None if pool.likelihoods is None else np.asarray(pool.likelihoods)}
    for _ in range(num_orders):
        order = rng.permutation(size)
        if greedy_first and pool.greedy is not None:
            order = np.concatenate([[pool.greedy], order[order != pool.greedy]])
        values = np.where(present, 0.0, -np.inf)
        # A truncated response is picked only while no complete one is among the first n.
        values -= TRUNCATED_PENALTY * np.outer(~complete[order], np.logical_or.accumulate(complete[order]))
        for name, weight in weights.items():
            if name == "greedy":
                values += weight * (order == pool.greedy)[:, None]
                continue
            column = fixed.get(name)
            raw = (
                np.cumsum(similarity[np.ix_(order, order)], axis=1) / np.maximum(1, counts - 1)
                if column is None
                else np.broadcast_to(column[order][:, None], (size, size))
            )
            deviations = raw - (raw * present).sum(axis=0) / counts
            spread = np.sqrt((deviations**2 * present).sum(axis=0) / counts)
            values += weight * np.divide(deviations, spread, out=np.zeros((size, size)), where=spread > MIN_SPREAD)
        yield order, values


def num_worthwhile_candidates(curve: Sequence[float]) -> int:
    """The number of candidates beyond which no further one adds `MIN_GAIN` to the curve; its length if all do."""
    gains = np.diff(np.asarray(curve))
    worthwhile = np.flatnonzero(gains >= MIN_GAIN)
    return int(worthwhile[-1]) + 2 if len(worthwhile) else 1


def extend_curve(curve: Vector, size: int) -> Vector:
    """Extends the curve to `size` with its last value."""
    return np.concatenate([curve, np.full(size - len(curve), curve[-1])])


def _log_binomial(n: npt.NDArray[np.int64], k: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    # Imported here because reading a report imports this module, but only an evaluation needs scipy.
    from scipy.special import gammaln

    logarithm: npt.NDArray[np.float64] = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    return logarithm
