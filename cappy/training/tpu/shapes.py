"""Static shapes: XLA compiles one program per shape, so every pass is cut and padded to one of a few.

Lengths double from 32 up to the scorer's own; for each there are three row counts: full, half and a quarter.
"""

from collections.abc import Iterator
from dataclasses import dataclass

SHORTEST = 32
PARTS = (1, 2, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """The shapes of a run: of pairs up to `longest` tokens, at most `tokens` padded ones, all devices together."""

    longest: int
    tokens: int
    devices: int

    @property
    def lengths(self) -> tuple[int, ...]:
        """Ascending; the last is the longest pair that the scorer reads."""
        doubled = [SHORTEST]
        while doubled[-1] * 2 < self.longest:
            doubled.append(doubled[-1] * 2)
        return (*(length for length in doubled if length < self.longest), self.longest)

    def length_of(self, tokens: int) -> int:
        """The length that pairs of so many tokens are padded to."""
        return next(length for length in self.lengths if length >= tokens)

    def rows(self, length: int) -> tuple[int, ...]:
        """Row counts for this length, the full one first; each is a multiple of the devices, at least one row each."""
        full = max(1, self.tokens // length)
        return tuple(-(-full // (part * self.devices)) * self.devices for part in PARTS)

    def pieces(self, pairs: int, length: int) -> Iterator[tuple[slice, int]]:
        """So many pairs as pieces of the row counts: which pairs, and the rows that they are padded to."""
        counts = self.rows(length)
        for start in range(0, pairs, counts[0]):
            own = min(counts[0], pairs - start)
            yield slice(start, start + own), min(count for count in counts if count >= own)
