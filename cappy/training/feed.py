"""What the loop is fed: whole instances, in an order and with draws that the seed and the update's number decide."""

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cappy.training.corpus import Corpus
from cappy.training.settings import TrainingSettings

_ROUNDS = 8
_ODD = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)


@dataclass(frozen=True, slots=True)
class Draw:
    """An instance of a corpus by its number, and the numbers of the responses drawn of it; `width` is the longest
    pair's tokens."""

    index: int
    chosen: tuple[int, ...]
    width: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of its pairs, padded to its longest."""
        return self.width * len(self.chosen)


def draw_batch(corpus: Corpus, update: int, size: int, max_candidates: int, *, seed: int) -> list[Draw]:
    """The `size` instances of an update (0-based), `max_candidates` drawn of each.

    Every pass holds every instance once, in an order of its own, and begins where the one before ended, be it in the
    middle of an update. Nothing is remembered from update to update: a resumed run asks for the next one.
    """
    places = range(update * size, (update + 1) * size)
    drawn = []
    for epoch in range(places[0] // len(corpus), places[-1] // len(corpus) + 1):
        own = [place - epoch * len(corpus) for place in places if place // len(corpus) == epoch]
        order = permute(np.array(own, dtype=np.uint64), len(corpus), f"{seed} {epoch}")
        for index in order.tolist():
            rng = random.Random(f"{seed} {epoch} {index}")
            drawn.append(_draw(corpus, index, range(corpus.size(index)), max_candidates, rng))
    return drawn


def count_updates(corpus: Corpus, config: TrainingSettings) -> int:
    """Updates that draw `config.train_rows` responses, or `config.epochs` times as many as there are."""
    drawn = corpus.responses_per_epoch(config.max_candidates) / len(corpus)
    rows = config.train_rows or corpus.facts.pairs * config.epochs
    return max(1, math.ceil(rows / (config.batch_instances * drawn) - 1e-9))


def draw_validation(corpus: Corpus, index: int, count: int, *, seed: int) -> Draw:
    """What a selector would see of a validation instance, at most `count` responses: the same draw at every check."""
    return _draw(corpus, index, corpus.selectable(index), count, random.Random(f"{seed} check {index}"))


def micro_batches(batch: Sequence[Draw], budget: int, parts: int = 1) -> list[list[Draw]]:
    """The instances, whole and of similar length together, in passes of at most `budget` padded tokens.

    An instance that alone has more tokens passes alone. At least `parts` passes, so that every rank has work, as far
    as there are instances.
    """
    micros: list[list[Draw]] = []
    pairs = 0
    for drawn in sorted(batch, key=lambda one: -one.width):
        if not micros or (pairs + len(drawn.chosen)) * micros[-1][0].width > budget:
            micros.append([])
            pairs = 0
        micros[-1].append(drawn)
        pairs += len(drawn.chosen)
    while len(micros) < min(parts, len(batch)):
        largest = max((micro for micro in micros if len(micro) > 1), key=padded_tokens)
        half = len(largest) // 2
        micros[micros.index(largest)] = largest[:half]
        micros.append(largest[half:])
    return micros


def comparison_mask(chosen: Sequence[int], selectable: Sequence[int]) -> list[bool]:
    """Which of the responses drawn are compared with each other: those that a selector may pick.

    All of them where fewer than two may be picked, as in the published data, which knows references and wrong choices.
    A mismatch is recognised at a glance and has the lowest label: it would be most of what a comparison teaches.
    """
    may = set(selectable)
    flags = [number in may for number in chosen]
    return flags if sum(flags) > 1 else [True] * len(chosen)


def padded_tokens(micro: Sequence[Draw]) -> int:
    """Padded tokens of a pass."""
    return sum(len(drawn.chosen) for drawn in micro) * max(drawn.width for drawn in micro)


def assign_passes(costs: Sequence[int], rank: int, count: int) -> list[int]:
    """Numbers of the passes that are this rank's: each, the costliest first, goes to the rank with the least so far."""
    loads, mine = [0] * count, []
    for number in sorted(range(len(costs)), key=lambda one: -costs[one]):
        least = loads.index(min(loads))
        loads[least] += costs[number]
        if least == rank:
            mine.append(number)
    return mine


def permute(positions: NDArray[np.uint64], size: int, key: str) -> NDArray[np.uint64]:
    """What stands at these positions of a random order of `range(size)`; the key alone decides the order.

    A Feistel network over the next power of four, walked again while it leads out of the range (at most four times as
    large, so a walk takes four steps in the mean). Memory holds the positions asked for, however large `size` is.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = np.frombuffer(hashlib.shake_128(key.encode()).digest(8 * _ROUNDS), dtype="<u8")
    values = _feistel(positions, half, keys)
    while (outside := values >= size).any():
        values[outside] = _feistel(values[outside], half, keys)
    return values


def _draw(corpus: Corpus, index: int, numbers: Sequence[int], count: int, rng: random.Random) -> Draw:
    chosen = tuple(numbers) if len(numbers) <= count else tuple(sorted(rng.sample(numbers, count)))
    return Draw(index, chosen, corpus.longest(index, chosen))


def _feistel(values: NDArray[np.uint64], half: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix_bits(right + key) & mask)
    return (left << bits) | right


def _mix_bits(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Bits of each value spread over all 64 (multiplication wraps around, which is wanted)."""
    values = (values ^ (values >> _HALF)) * _ODD
    values = (values ^ (values >> _HALF)) * _ODD
    return values ^ (values >> _HALF)
