"""What the loop eats: whole instances, in an order and with draws that the seed and the update's number decide."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cappy.annotation.labels import regression_rows
from cappy.records import Instance
from cappy.records.instance import Source
from cappy.training.order import permuted
from cappy.training.plan import TrainingSettings

if TYPE_CHECKING:
    from cappy.training.corpus import Corpus


@dataclass(frozen=True, slots=True)
class Group:
    """One instance as training sees it: responses, labels, which a selector may pick, and where they came from."""

    instruction: str
    responses: tuple[str, ...]
    labels: tuple[float, ...]
    selectable: tuple[bool, ...]
    sources: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class Drawn:
    """An instance of a corpus by its number, and the numbers of the responses drawn of it; `width` is the longest
    pair's tokens."""

    index: int
    chosen: tuple[int, ...]
    width: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of its pairs, padded to its longest."""
        return self.width * len(self.chosen)


def to_group(instance: Instance, metric: str, sources: Sequence[Source] = ()) -> Group:
    """The instance's rows of the regression set, of these sources if any are named.

    RecordError where a candidate has no label of this metric.
    """
    rows = [row for row in regression_rows(instance, metric) if not sources or row.source in sources]
    selectable = {candidate.response for candidate in instance.selectable}
    return Group(
        instruction=instance.instruction,
        responses=tuple(row.response for row in rows),
        labels=tuple(row.label for row in rows),
        selectable=tuple(row.response in selectable for row in rows),
        sources=tuple(row.source for row in rows),
    )


def split_rows(group: Group) -> list[Group]:
    """One group per response, for training in rows."""
    columns = zip(group.responses, group.labels, group.selectable, group.sources, strict=True)
    return [Group(group.instruction, (text,), (label,), (may,), (source,)) for text, label, may, source in columns]


def batch(corpus: "Corpus", update: int, size: int, max_candidates: int, *, seed: int) -> list[Drawn]:
    """The `size` instances of an update (0-based), `max_candidates` drawn of each.

    Every pass holds every instance once, in an order of its own, and begins where the one before ended, be it in the
    middle of an update. Nothing is remembered from update to update: a resumed run asks for the next one.
    """
    places = range(update * size, (update + 1) * size)
    drawn = []
    for epoch in range(places[0] // len(corpus), places[-1] // len(corpus) + 1):
        own = [place - epoch * len(corpus) for place in places if place // len(corpus) == epoch]
        order = permuted(np.array(own, dtype=np.uint64), len(corpus), f"{seed} {epoch}")
        for index in order.tolist():
            rng = random.Random(f"{seed} {epoch} {index}")
            drawn.append(_drawn(corpus, index, range(corpus.size(index)), max_candidates, rng))
    return drawn


def updates_of(corpus: "Corpus", plan: TrainingSettings) -> int:
    """Updates that draw `plan.train_rows` responses, or `plan.epochs` times as many as there are."""
    drawn = corpus.drawable(plan.max_candidates) / len(corpus)
    rows = plan.train_rows or corpus.facts.pairs * plan.epochs
    return max(1, math.ceil(rows / (plan.batch_instances * drawn) - 1e-9))


def pool(corpus: "Corpus", index: int, count: int, *, seed: int) -> Drawn:
    """What a selector would see of a validation instance, at most `count` responses: the same draw at every check."""
    return _drawn(corpus, index, corpus.selectable(index), count, random.Random(f"{seed} check {index}"))


def micro_batches(batch: Sequence[Drawn], budget: int, parts: int = 1) -> list[list[Drawn]]:
    """The instances, whole and of similar length together, in passes of at most `budget` padded tokens.

    An instance that alone has more tokens passes alone. At least `parts` passes, so that every rank has work, as far
    as there are instances.
    """
    micros: list[list[Drawn]] = []
    pairs = 0
    for drawn in sorted(batch, key=lambda one: -one.width):
        if not micros or (pairs + len(drawn.chosen)) * micros[-1][0].width > budget:
            micros.append([])
            pairs = 0
        micros[-1].append(drawn)
        pairs += len(drawn.chosen)
    while len(micros) < min(parts, len(batch)):
        largest = max((micro for micro in micros if len(micro) > 1), key=padded)
        half = len(largest) // 2
        micros[micros.index(largest)] = largest[:half]
        micros.append(largest[half:])
    return micros


def comparable(chosen: Sequence[int], selectable: Sequence[int]) -> list[bool]:
    """Which of the responses drawn are compared with each other: those that a selector may pick.

    All of them where fewer than two may be picked, as in the published data, which knows references and wrong choices.
    A mismatch is told apart at a glance and has the lowest label: it would be most of what a comparison teaches.
    """
    may = set(selectable)
    flags = [number in may for number in chosen]
    return flags if sum(flags) > 1 else [True] * len(chosen)


def padded(micro: Sequence[Drawn]) -> int:
    """Padded tokens of a pass."""
    return sum(len(drawn.chosen) for drawn in micro) * max(drawn.width for drawn in micro)


def dealt(costs: Sequence[int], rank: int, count: int) -> list[int]:
    """Numbers of the passes that are this rank's: each, the costliest first, goes to the rank with the least so far."""
    loads, mine = [0] * count, []
    for number in sorted(range(len(costs)), key=lambda one: -costs[one]):
        least = loads.index(min(loads))
        loads[least] += costs[number]
        if least == rank:
            mine.append(number)
    return mine


def _drawn(corpus: "Corpus", index: int, numbers: Sequence[int], count: int, rng: random.Random) -> Drawn:
    chosen = tuple(numbers) if len(numbers) <= count else tuple(sorted(rng.sample(numbers, count)))
    return Drawn(index, chosen, corpus.longest(index, chosen))
