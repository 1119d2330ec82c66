"""Pools: the candidates of one instance that a selector may pick, with their labels and scores."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cappy.errors import ConfigError, RecordError, shown
from cappy.records import Candidate, Instance, Split

Vector = npt.NDArray[np.float64]
Score = Callable[[Sequence[tuple[str, str]]], list[float]]
"""Scores of (instruction, response) pairs, in their order: the type of `Scorer.score`."""

CHUNK_PAIRS = 2048


class AnyScorer(Protocol):
    """What the step needs of a scorer."""

    @property
    def version(self) -> str:
        """A name that changes with the weights."""

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """The scores of (instruction, response) pairs, in order."""


@dataclass(frozen=True)
class Pool:
    """The selectable candidates of an instance and their labels, in the same order."""

    instance: Instance
    candidates: tuple[Candidate, ...]
    labels: Vector

    @cached_property
    def responses(self) -> tuple[str, ...]:
        """The texts, in order."""
        return tuple(candidate.response for candidate in self.candidates)

    @property
    def is_choice(self) -> bool:
        """Whether the candidates are the instance's closed set of answers, so that its result is an accuracy."""
        return bool(self.instance.choices) and all(candidate.source == "choice" for candidate in self.candidates)


def collect(instances: Iterable[Instance], *, metric: str, splits: Collection[Split]) -> list[Pool]:
    """The pools of these splits, empty ones included; RecordError where a candidate has no label of this metric."""
    return [_pool(instance, metric) for instance in instances if instance.split in splits]


def score_pools(pools: Sequence[Pool], score: Score, told: Callable[[int], None]) -> list[Vector]:
    """The scores of every pool's candidates; a text that stands in a pool twice is scored once.

    `told` hears how many pairs each call scored. ConfigError where a score is missing or not a finite number.
    """
    texts = [tuple(dict.fromkeys(pool.responses)) for pool in pools]
    pairs = [(pool.instance.instruction, text) for pool, unique in zip(pools, texts, strict=True) for text in unique]
    scores = iter(list(_scores(pairs, score, told)))
    found = []
    for pool, unique in zip(pools, texts, strict=True):
        of = {text: next(scores) for text in unique}
        found.append(np.array([of[text] for text in pool.responses]))
    return found


def num_pairs(pools: Sequence[Pool]) -> int:
    """How many pairs `score_pools` scores."""
    return sum(len(set(pool.responses)) for pool in pools)


def _scores(pairs: Sequence[tuple[str, str]], score: Score, told: Callable[[int], None]) -> Iterator[float]:
    for start in range(0, len(pairs), CHUNK_PAIRS):
        chunk = pairs[start : start + CHUNK_PAIRS]
        scores = score(chunk)
        if len(scores) != len(chunk):
            raise ConfigError(f"the scorer gave {len(scores)} scores for {len(chunk)} pairs; it must give one for each")
        for (instruction, _), value in zip(chunk, scores, strict=True):
            if not np.isfinite(value):
                raise ConfigError(
                    f"the scorer gave {value} for the instruction {shown(instruction)}; its weights are damaged, "
                    "train it again"
                )
        yield from scores
        told(len(chunk))


def _pool(instance: Instance, metric: str) -> Pool:
    candidates = instance.selectable
    for index, candidate in enumerate(instance.candidates):
        if candidate.selectable and metric not in candidate.labels:
            raise RecordError(
                f"instance {shown(instance.instance_id)}: candidate {index} has no label {shown(metric)}; "
                "run cappy annotation first"
            )
    return Pool(instance, candidates, np.array([candidate.labels[metric] for candidate in candidates]))
