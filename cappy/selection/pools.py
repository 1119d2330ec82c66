"""Pools: the candidates of an instance that a selector may pick, with labels, scores and MBR values.

MBR (minimum Bayes risk; Kumar and Byrne, 2004) picks the response that is most similar to all others of its pool.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from cappy.errors import ConfigError, RecordError, quote
from cappy.records import Candidate, Instance, Split
from cappy.records.instance import MAX_LOGPROB

Vector = npt.NDArray[np.float64]
PoolVectors = Sequence[Vector]
"""One vector per pool with one number per candidate: a selector's values, a scorer's scores, or labels."""
ScoreFunction = Callable[[Sequence[tuple[str, str]]], list[float]]
"""Scores (instruction, response) pairs, in order: the type of `Scorer.score`."""

CHUNK_PAIRS = 2048
MIN_SHARE = 0.9
"""Share of the pools that must have a greedy response, or likelihoods, to compare with it; a few requests fail."""
MAX_MBR_CHARACTERS = 400_000
"""Characters of all responses of a pool that MBR compares, the same number of each: at most about a second of work."""
MIN_MBR_CHARACTERS = 512
"""Characters of each response that MBR compares however many responses there are."""


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
    def lengths(self) -> Vector:
        """Length of every response in characters."""
        return np.array([len(response) for response in self.responses], dtype=np.float64)

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


_GREEDY = re.compile(r"\b(greedy|temperature=?0)(?![\w.])", re.IGNORECASE)
"""Names of greedy decodings; an endpoint decodes greedily at temperature 0, in a decoding of that name."""


def choose_system(pools: Sequence[Pool], among: Collection[str] | None = None) -> str | None:
    """The generator and decoding whose first candidate has the best mean label; None if no candidate names one.

    `among` restricts the choice to these systems. In a pool without the system, its first candidate counts.
    """
    names = dict.fromkeys(_system_name(candidate) for pool in pools for candidate in pool.candidates)
    names.pop("", None)
    if among is not None:
        names = {name: None for name in names if name in among}
    indices = [_first_indices(pool) for pool in pools]

    def mean_label(name: str) -> float:
        return float(
            np.mean([pool.labels[index_of.get(name, 0)] for pool, index_of in zip(pools, indices, strict=True)])
        )

    return max(names, key=mean_label, default=None)


def greedy_systems(pools: Sequence[Pool]) -> set[str]:
    """The generators and decodings that decode greedily and have a response in nearly every pool (`MIN_SHARE`)."""
    counts = Counter(name for pool in pools for name in _first_indices(pool) if is_greedy(name))
    return {name for name, count in counts.items() if count >= MIN_SHARE * len(pools)}


def choose_decoding(pools: Sequence[Pool]) -> str | None:
    """The single decoding that a user would compare with: the best greedy one, else the best one; None if unknown.

    A system with several responses in a pool is no single decoding: which of its samples a user would get is chance.
    """
    names = [[_system_name(candidate) for candidate in pool.candidates] for pool in pools]
    repeated = {name for own in names for name, count in Counter(own).items() if count > 1}
    single = {name for own in names for name in own} - repeated
    return choose_system(pools, among=greedy_systems(pools)) or choose_system(pools, among=single)


def is_greedy(system: str) -> bool:
    """Whether a generator and decoding is greedy by its name."""
    return bool(_GREEDY.search(system))


def system_index(pool: Pool, name: str) -> int | None:
    """The index of the first candidate of a system; None if the pool has none."""
    return _first_indices(pool).get(name) if name else None


def _first_indices(pool: Pool) -> dict[str, int]:
    """System -> the index of its first candidate."""
    names = [_system_name(candidate) for candidate in pool.candidates]
    return {name: index for index, name in reversed([*enumerate(names)])}


def _system_name(candidate: Candidate) -> str:
    """The generator and decoding of a candidate; empty if neither is known."""
    return f"{candidate.generator} {candidate.decoding}".strip()


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
    # NaN and infinity count as missing.
    present = [value for value in values if value is not None and abs(value) <= MAX_LOGPROB]
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

    Computed as 2c / (m + n) for a common subsequence of c tokens, which equals `rouge_score` up to rounding. Only the
    beginning of a very long response is compared, `MAX_MBR_CHARACTERS` in all, because the time grows quadratically.
    """
    # Imported here because reading a report needs the names of the selectors, but not these libraries.
    from rapidfuzz import process
    from rapidfuzz.distance import LCSseq

    from cappy.annotation.rouge import token_strings

    limit = max(MIN_MBR_CHARACTERS, MAX_MBR_CHARACTERS // max(1, len(responses)))
    tokens, _ = token_strings([response[:limit] for response in responses])
    unique = {text: index for index, text in enumerate(dict.fromkeys(tokens))}
    texts = list(unique)
    common = process.cdist(texts, texts, scorer=LCSseq.similarity, dtype=np.int32)
    sizes = np.array([len(text) for text in texts])
    f_measure = 2.0 * common / np.maximum(sizes[:, None] + sizes[None, :], 1)
    indices = [unique[text] for text in tokens]
    mutual: npt.NDArray[np.float64] = f_measure[np.ix_(indices, indices)]
    return mutual
