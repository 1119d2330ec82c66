"""A random order of any number of rows in constant memory: a keyed permutation instead of a shuffled list."""

import hashlib

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8
_ODD = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)


def permuted(positions: NDArray[np.uint64], size: int, key: str) -> NDArray[np.uint64]:
    """What stands at these positions of a random order of `range(size)`; the key alone decides the order.

    A Feistel network over the next power of four, walked again while it leads out of the range (at most four times as
    large, so a walk takes four steps in the mean). Memory holds the positions asked for, however large `size` is.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = np.frombuffer(hashlib.shake_128(key.encode()).digest(8 * ROUNDS), dtype="<u8")
    found = _network(positions, half, keys)
    while (outside := found >= size).any():
        found[outside] = _network(found[outside], half, keys)
    return found


def _network(values: NDArray[np.uint64], half: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right + key) & mask)
    return (left << bits) | right


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Bits of each value spread over all 64 (multiplication wraps around, which is wanted)."""
    values = (values ^ (values >> _HALF)) * _ODD
    values = (values ^ (values >> _HALF)) * _ODD
    return values ^ (values >> _HALF)
