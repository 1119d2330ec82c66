"""Selectors: rules that pick one candidate of an instance.

Each gives every candidate a value, from what a user would have and never from references; the highest value is picked.
Of equal values a user gets the first, but which one stands first says nothing of the selector: its result is their mean
label. Random choice has no pick: its result is the mean label of the pool.
"""

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from rapidfuzz import process
from rapidfuzz.distance import LCSseq

from cappy.annotation.rouge import token_strings
from cappy.evaluation.pools import Pool, Vector
from cappy.records import Candidate

_GREEDY = re.compile(r"\b(greedy|temperature0)(?![\w.])", re.IGNORECASE)
"""An endpoint draws the most probable token at temperature 0.0, in a decoding of that name."""


def pick(values: Vector) -> int:
    """The index of the highest value, the first of equal ones."""
    return int(np.argmax(values))


def picked(pools: Sequence[Pool], values: Sequence[Vector]) -> Vector:
    """The label to expect of the pick in every pool, shape (pools,): of equal values the mean of their labels."""
    return np.array([pick_label(own, pool.labels) for pool, own in zip(pools, values, strict=True)])


def pick_label(values: Vector, labels: Vector) -> float:
    """The mean label of the candidates with the highest value: what a pick among them at random is worth."""
    return float(labels[values == values.max()].mean())


def is_tied(values: Vector, labels: Vector) -> bool:
    """Whether candidates with different labels share the highest value, so that order alone decides between them."""
    top = labels[values == values.max()]
    return bool((top != top[0]).any())


def first(responses: Sequence[str]) -> Vector:
    """The order of the candidates: what a user without a selector takes."""
    order: Vector = -np.arange(len(responses), dtype=np.float64)
    return order


def longest(responses: Sequence[str]) -> Vector:
    """Length in characters."""
    return np.array([len(response) for response in responses], dtype=np.float64)


def shortest(responses: Sequence[str]) -> Vector:
    """Length in characters, negated."""
    return -longest(responses)


def likelihood_sum(candidates: Sequence[Candidate]) -> Vector | None:
    """Log-likelihood under the generator; None where a candidate has none."""
    return _complete([candidate.logprob_sum for candidate in candidates])


def likelihood_mean(candidates: Sequence[Candidate]) -> Vector | None:
    """Log-likelihood under the generator per token; None where a candidate has none."""
    return _complete([candidate.logprob_mean for candidate in candidates])


def system_of(candidate: Candidate) -> str:
    """The generator and decoding that a candidate came from; empty where neither is known."""
    return f"{candidate.generator} {candidate.decoding}".strip()


def is_greedy(candidate: Candidate) -> bool:
    """Whether it was decoded greedily, by the name of its decoding (or of the system that a file names)."""
    return bool(_GREEDY.search(system_of(candidate)))


def system(candidates: Sequence[Candidate], name: str) -> Vector:
    """The first candidate of the system, or of the pool where the system has none in it."""
    order = first([candidate.response for candidate in candidates])
    other = np.array([system_of(candidate) != name for candidate in candidates])
    values: Vector = order - len(candidates) * other
    return values


def hybrid(scores: Vector, other: Vector, weight: float) -> Vector:
    """The scorer's score plus `weight` times another selector's value, both as they are."""
    return scores + weight * other


def mbr(responses: Sequence[str]) -> Vector:
    """Minimum Bayes risk: mean Rouge-L of each response against the others of the pool (Kumar and Byrne, 2004).

    A lone response has 0. Means that are equal but for their last bits count as equal.
    """
    similarity = mutual_rouge_l(responses)
    return consensus(similarity.sum(axis=1) - similarity.diagonal(), len(responses))


def consensus(sums: Vector, count: int) -> Vector:
    """Mean similarity to the `count` - 1 others, rounded so that another order of adding makes no difference."""
    means: Vector = np.round(sums / max(1, count - 1), 12)
    return means


def mutual_rouge_l(responses: Sequence[str]) -> npt.NDArray[np.float64]:
    """Rouge-L F1 (stemmed) of every response against every other, shape (responses, responses), symmetric.

    It is 2c / (m + n) for a common subsequence of c tokens: `rouge_score`'s value up to its last bits.
    """
    tokens, _ = token_strings(responses)
    unique = {text: index for index, text in enumerate(dict.fromkeys(tokens))}
    texts = list(unique)
    common = process.cdist(texts, texts, scorer=LCSseq.similarity, dtype=np.int32)
    sizes = np.array([len(text) for text in texts])
    f_measure = 2.0 * common / np.maximum(sizes[:, None] + sizes[None, :], 1)
    where = [unique[text] for text in tokens]
    mutual: npt.NDArray[np.float64] = f_measure[np.ix_(where, where)]
    return mutual


def _complete(values: Sequence[float | None]) -> Vector | None:
    known = [value for value in values if value is not None and value == value]
    return np.array(known, dtype=np.float64) if len(known) == len(values) else None
