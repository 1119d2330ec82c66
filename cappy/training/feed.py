"""Draws the batches of training: whole instances, whose order and responses depend only on the seed and the update."""

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
_MIX_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_HALF_WORD = np.uint64(32)


@dataclass(frozen=True, slots=True)
class DrawnInstance:
    """The indices of an instance and of its drawn responses; `width` is the longest of their pairs in tokens."""

    index: int
    responses: tuple[int, ...]
    width: int = 0

    @property
    def tokens(self) -> int:
        """The number of tokens of all pairs, padded to the longest pair."""
        return self.width * len(self.responses)


def draw_batch(corpus: Corpus, update_index: int, size: int, max_candidates: int, *, seed: int) -> list[DrawnInstance]:
    """The `size` instances of an update (counted from 0), with up to `max_candidates` responses drawn from each.

    Every epoch contains each instance once, in its own random order; an update may span the end of one epoch and the
    start of the next. The function has no state, so a resumed run continues with the next update.
    """
    positions = range(update_index * size, (update_index + 1) * size)
    draws = []
    for epoch in range(positions[0] // len(corpus), positions[-1] // len(corpus) + 1):
        indices = [position - epoch * len(corpus) for position in positions if position // len(corpus) == epoch]
        order = permute(np.array(indices, dtype=np.uint64), len(corpus), f"{seed} {epoch}")
        for index in order.tolist():
            rng = random.Random(f"{seed} {epoch} {index}")
            draws.append(_draw(corpus, index, range(corpus.size(index)), max_candidates, rng))
    return draws


def count_updates(corpus: Corpus, config: TrainingSettings) -> int:
    """The number of updates that draw `config.train_rows` responses, or `config.epochs` times all responses."""
    draws_per_instance = corpus.responses_per_epoch(config.max_candidates) / len(corpus)
    rows = config.train_rows or corpus.facts.pairs * config.epochs
    return max(1, math.ceil(rows / (config.batch_instances * draws_per_instance) - 1e-9))


def draw_validation(corpus: Corpus, index: int, count: int, *, seed: int) -> DrawnInstance:
    """At most `count` selectable responses of a validation instance; the same draw at every check."""
    return _draw(corpus, index, corpus.selectable(index), count, random.Random(f"{seed} check {index}"))


def split_batch(batch: Sequence[DrawnInstance], budget: int, min_passes: int = 1) -> list[list[DrawnInstance]]:
    """Splits a batch into passes of at most `budget` padded tokens, each with whole instances of similar length.

    An instance with more tokens is a pass by itself. There are at least `min_passes` passes, so that every rank has
    work, unless there are fewer instances.
    """
    passes: list[list[DrawnInstance]] = []
    pairs = 0
    for draw in sorted(batch, key=lambda draw: draw.width, reverse=True):
        if not passes or (pairs + len(draw.responses)) * passes[-1][0].width > budget:
            passes.append([])
            pairs = 0
        passes[-1].append(draw)
        pairs += len(draw.responses)
    while len(passes) < min(min_passes, len(batch)):
        largest = max((draws for draws in passes if len(draws) > 1), key=padded_tokens)
        half = len(largest) // 2
        passes[passes.index(largest)] = largest[:half]
        passes.append(largest[half:])
    return passes


def comparison_mask(responses: Sequence[int], selectable: Sequence[int]) -> list[bool]:
    """For each drawn response, whether the losses that compare responses use it.

    These use only selectable responses, or all if fewer than two are selectable.

    The published data has only references and wrong choices, so all of them are compared. Mismatches (references of
    other instances) are left out because they are easy to recognise and have the lowest label, so they would dominate
    the comparison.
    """
    allowed = set(selectable)
    flags = [response in allowed for response in responses]
    return flags if sum(flags) > 1 else [True] * len(responses)


def padded_tokens(draws: Sequence[DrawnInstance]) -> int:
    """The number of tokens of a pass, including padding."""
    return sum(len(draw.responses) for draw in draws) * max(draw.width for draw in draws)


def assign_passes(costs: Sequence[int], rank: int, count: int) -> list[int]:
    """The indices of the passes that `rank` runs, one of `count` ranks.

    Passes are assigned greedily: the costliest first, each to the rank with the lowest load so far.
    """
    loads, own_passes = [0] * count, []
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        lightest = loads.index(min(loads))
        loads[lightest] += costs[index]
        if lightest == rank:
            own_passes.append(index)
    return own_passes


def permute(positions: NDArray[np.uint64], size: int, key: str) -> NDArray[np.uint64]:
    """The values at `positions` of a pseudo-random permutation of `range(size)`, which depends only on `key`.

    A Feistel network over the next power of four, with cycle walking (Black and Rogaway 2002): values outside the range
    are permuted again, at most four times on average. Memory grows with the number of positions, not with `size`.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = np.frombuffer(hashlib.shake_128(key.encode()).digest(8 * _ROUNDS), dtype="<u8")
    values = _feistel(positions, half, keys)
    while (outside := values >= size).any():
        values[outside] = _feistel(values[outside], half, keys)
    return values


def _draw(corpus: Corpus, index: int, candidates: Sequence[int], count: int, rng: random.Random) -> DrawnInstance:
    responses = tuple(candidates) if len(candidates) <= count else tuple(sorted(rng.sample(candidates, count)))
    return DrawnInstance(index, responses, corpus.max_tokens(index, responses))


def _feistel(values: NDArray[np.uint64], half: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix_bits(right + key) & mask)
    return (left << bits) | right


def _mix_bits(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spreads the bits of each value over all 64 bits; overflow of the multiplication is intended."""
    values = (values ^ (values >> _HALF_WORD)) * _MIX_MULTIPLIER
    values = (values ^ (values >> _HALF_WORD)) * _MIX_MULTIPLIER
    return values ^ (values >> _HALF_WORD)
