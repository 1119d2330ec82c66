"""Pools: the candidates of an instance that a selector may pick, with labels, scores, MBR values and best-of-n curves.

MBR (minimum Bayes risk; Kumar and Byrne, 2004) picks the response that is most similar to all others of its pool. Best
of n is the expected label of a selector's pick when n candidates of the pool are sampled.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from cappy.errors import ConfigError, RecordError, quote
from cappy.records import Candidate, Instance, Split

Vector = npt.NDArray[np.float64]
PoolVectors = Sequence[Vector]
"""One vector per pool with one number per candidate: a selector's values, a scorer's scores, or labels."""
ScoreFunction = Callable[[Sequence[tuple[str, str]]], list[float]]
"""Scores (instruction, response) pairs, in order: the type of `Scorer.score`."""

CHUNK_PAIRS = 2048


@dataclass(frozen=True)
class Pool:
    """The selectable candidates of an instance, their labels, and the scores of each scorer, all in the same order.

    Labels are for fitting and reports only; a selector picks by the other fields.
    """

    instance: Instance
    candidates: tuple[Candidate, ...]
    labels: Vector
    scores: Mapping[str, Vector] = field(default_factory=dict)

    @cached_property
    def responses(self) -> tuple[str, ...]:
        """The response texts, in order."""
        return tuple(candidate.response for candidate in self.candidates)

    @cached_property
    def mbr(self) -> Vector:
        """Mean similarity of each response to the others (`mbr`)."""
        return mbr(self.responses)

    @property
    def likelihood_sum(self) -> Vector | None:
        """Log-likelihood under the generator; None if a candidate has none."""
        return _vector_if_complete([candidate.logprob_sum for candidate in self.candidates])

    @property
    def likelihood_mean(self) -> Vector | None:
        """Log-likelihood per token under the generator; None if a candidate has none."""
        return _vector_if_complete([candidate.logprob_mean for candidate in self.candidates])

    @property
    def is_choice(self) -> bool:
        """Whether the candidates are the instance's closed set of answers, so that its result is an accuracy."""
        return bool(self.instance.choices) and all(candidate.source == "choice" for candidate in self.candidates)


def collect_pools(instances: Iterable[Instance], *, metric: str, splits: Collection[Split]) -> list[Pool]:
    """Builds the pools of these splits, even empty ones. Raises RecordError if a candidate has no label of `metric`."""
    return [_build_pool(instance, metric) for instance in instances if instance.split in splits]


def score_pools(pools: Sequence[Pool], score: ScoreFunction, on_scored: Callable[[int], None]) -> list[Vector]:
    """The scores of the candidates of every pool; a text that is in a pool twice is scored once.

    `on_scored` is called with the number of pairs after each call of `score`. Raises ConfigError if a score is missing
    or not finite.
    """
    texts = [tuple(dict.fromkeys(pool.responses)) for pool in pools]
    pairs = [(pool.instance.instruction, text) for pool, unique in zip(pools, texts, strict=True) for text in unique]
    scores = iter(list(_score_chunks(pairs, score, on_scored)))
    by_pool = []
    for pool, unique in zip(pools, texts, strict=True):
        score_of = {text: next(scores) for text in unique}
        by_pool.append(np.array([score_of[text] for text in pool.responses]))
    return by_pool


def with_scores(pools: Sequence[Pool], name: str, scores: PoolVectors) -> list[Pool]:
    """The pools with these scores added under `name`."""
    return [replace(pool, scores={**pool.scores, name: vector}) for pool, vector in zip(pools, scores, strict=True)]


def count_pairs(pools: Sequence[Pool]) -> int:
    """Number of pairs that `score_pools` scores: the distinct texts of every pool."""
    return sum(len(set(pool.responses)) for pool in pools)


def pick(values: Vector) -> int:
    """The index of the highest value, the first one if several are equal."""
    return int(np.argmax(values))


def pick_labels(pools: Sequence[Pool], values: PoolVectors) -> Vector:
    """The expected label of the pick of every pool, shape (pools,); for equal values, the mean of their labels."""
    return np.array([pick_label(vector, pool.labels) for pool, vector in zip(pools, values, strict=True)])


def pick_label(values: Vector, labels: Vector) -> float:
    """The mean label of the candidates with the highest value."""
    return float(labels[values == values.max()].mean())


def is_tied(values: Vector, labels: Vector) -> bool:
    """Whether candidates with different labels share the highest value, so that their order decides the pick."""
    top = labels[values == values.max()]
    return bool((top != top[0]).any())


def _score_chunks(
    pairs: Sequence[tuple[str, str]], score: ScoreFunction, on_scored: Callable[[int], None]
) -> Iterator[float]:
    for start in range(0, len(pairs), CHUNK_PAIRS):
        chunk = pairs[start : start + CHUNK_PAIRS]
        scores = score(chunk)
        if len(scores) != len(chunk):
            raise ConfigError(
                f"the scorer returned {len(scores)} scores for {len(chunk)} pairs; it must return one per pair"
            )
        for (instruction, _), value in zip(chunk, scores, strict=True):
            if not np.isfinite(value):
                raise ConfigError(
                    f"the scorer returned {value} for the instruction {quote(instruction)}; its weights are damaged, "
                    "train it again"
                )
        yield from scores
        on_scored(len(chunk))


def _build_pool(instance: Instance, metric: str) -> Pool:
    candidates = instance.selectable
    for index, candidate in enumerate(instance.candidates):
        if candidate.selectable and metric not in candidate.labels:
            raise RecordError(
                f"instance {quote(instance.instance_id)}: candidate {index} has no label {quote(metric)}; "
                "run cappy annotation first"
            )
    return Pool(instance, candidates, np.array([candidate.labels[metric] for candidate in candidates]))


def _vector_if_complete(values: Sequence[float | None]) -> Vector | None:
    # NaN, which does not equal itself, counts as missing.
    present = [value for value in values if value is not None and value == value]
    return np.array(present, dtype=np.float64) if len(present) == len(values) else None


def mbr(responses: Sequence[str]) -> Vector:
    """Mean Rouge-L of each response against the others of the pool, shape (responses,); a single response has 0.

    Rounded, so that equal means do not differ by the order of summation.
    """
    similarity = mutual_rouge_l(responses)
    sums = similarity.sum(axis=1) - similarity.diagonal()
    means: Vector = np.round(sums / max(1, len(responses) - 1), 12)
    return means


def mutual_rouge_l(responses: Sequence[str]) -> npt.NDArray[np.float64]:
    """Rouge-L F1 (stemmed) of every response against every other, shape (responses, responses), symmetric.

    Computed as 2c / (m + n) for a common subsequence of c tokens, which equals `rouge_score` up to rounding.
    """
    # Imported here because reading a report needs the names of the selectors, but not these libraries.
    from rapidfuzz import process
    from rapidfuzz.distance import LCSseq

    from cappy.annotation.rouge import token_strings

    tokens, _ = token_strings(responses)
    unique = {text: index for index, text in enumerate(dict.fromkeys(tokens))}
    texts = list(unique)
    common = process.cdist(texts, texts, scorer=LCSseq.similarity, dtype=np.int32)
    sizes = np.array([len(text) for text in texts])
    f_measure = 2.0 * common / np.maximum(sizes[:, None] + sizes[None, :], 1)
    indices = [unique[text] for text in tokens]
    mutual: npt.NDArray[np.float64] = f_measure[np.ix_(indices, indices)]
    return mutual


NUM_MBR_ORDERS = 32
"""Random orders of each pool that the MBR curve is averaged over."""
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
    responses: tuple[str, ...], labels: Vector, rng: np.random.Generator, num_orders: int = NUM_MBR_ORDERS
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
        # Sums that differ only by rounding count as equal.
        tied = sums >= sums.max(axis=0) - 1e-9
        total += labels[order] @ tied / tied.sum(axis=0)
    mean: Vector = total / num_orders
    mean[:2] = labels.mean()
    return mean


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
