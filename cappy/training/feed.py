"""What the loop eats: whole instances, in an order that a seed and a pass number decide."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cappy.annotation.rows import regression_rows
from cappy.records import Instance, prompt_hash
from cappy.records.instance import Source


@dataclass(frozen=True, slots=True)
class Group:
    """One instance as training sees it: responses with their labels, and which a selector may pick."""

    instruction: str
    responses: tuple[str, ...]
    labels: tuple[float, ...]
    selectable: tuple[bool, ...]


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
    )


def prompt_hashes(instances: Iterable[Instance]) -> NDArray[np.uint64]:
    """Sorted distinct `prompt_hash` of the instances."""
    return np.unique(np.fromiter((prompt_hash(i.instruction) for i in instances), dtype="<u8"))


def batches(groups: Sequence[Group], size: int, max_candidates: int, *, seed: int, epoch: int) -> Iterator[list[Group]]:
    """One pass over the groups in an order of its own, `size` to a batch, `max_candidates` drawn of each."""
    rng = random.Random(f"{seed} {epoch}")
    order = list(range(len(groups)))
    rng.shuffle(order)
    for start in range(0, len(order), size):
        yield [_drawn(groups[index], max_candidates, rng) for index in order[start : start + size]]


def micro_batches(batch: Sequence[Group], lengths: Sequence[Sequence[int]], budget: int) -> Iterator[list[int]]:
    """Indices of whole groups of similar length whose padded tokens stay within `budget` (or one group alone)."""
    longest = [max(group) for group in lengths]
    micro: list[int] = []
    pairs = width = 0
    for index in sorted(range(len(batch)), key=lambda i: -longest[i]):
        width = width if micro else longest[index]
        if micro and (pairs + len(lengths[index])) * width > budget:
            yield micro
            micro, pairs, width = [], 0, longest[index]
        micro.append(index)
        pairs += len(lengths[index])
    if micro:
        yield micro


def pools_to_check(groups: Sequence[Group], count: int, seed: int) -> list[Group]:
    """What a selector would see of each group, at most `count` responses: the draw is the same at every check."""
    rng = random.Random(seed)
    kept = [_subset(group, [i for i, selectable in enumerate(group.selectable) if selectable]) for group in groups]
    return [_drawn(group, count, rng) for group in kept if group.responses]


def _drawn(group: Group, count: int, rng: random.Random) -> Group:
    if len(group.responses) <= count:
        return group
    return _subset(group, sorted(rng.sample(range(len(group.responses)), count)))


def _subset(group: Group, chosen: Sequence[int]) -> Group:
    return Group(
        instruction=group.instruction,
        responses=tuple(group.responses[i] for i in chosen),
        labels=tuple(group.labels[i] for i in chosen),
        selectable=tuple(group.selectable[i] for i in chosen),
    )
