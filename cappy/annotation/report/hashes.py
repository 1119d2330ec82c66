"""How many different values there are, by 64-bit hashes: 8 bytes per distinct value and split."""

import hashlib

import numpy as np
import numpy.typing as npt

from cappy.annotation.report.columns import Codes
from cappy.annotation.report.record import Repetition

Hashes = npt.NDArray[np.uint64]
_FEWEST_PENDING = 2**12


def text_hash(text: str) -> int:
    """64 bits of a text as it stands."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


class Distinct:
    """The distinct hashes among those added, sorted; merging waits until there is enough to merge."""

    def __init__(self) -> None:
        self._merged: Hashes = np.zeros(0, dtype=np.uint64)
        self._pending: list[Hashes] = []
        self._num_pending = 0

    def add(self, hashes: Hashes) -> None:
        """Takes hashes in, repeated ones too."""
        self._pending.append(np.unique(hashes))
        self._num_pending += len(self._pending[-1])
        if self._num_pending > max(len(self._merged), _FEWEST_PENDING):
            self.hashes()

    def hashes(self) -> Hashes:
        """Every distinct hash."""
        if self._pending:
            self._merged = np.unique(np.concatenate([self._merged, *self._pending]))
            self._pending, self._num_pending = [], 0
        return self._merged


class RepetitionTotals:
    """Values by split."""

    def __init__(self) -> None:
        self._values = 0
        self._splits: dict[str, Distinct] = {}

    def add(self, hashes: Hashes, splits: Codes) -> None:
        """Takes the hash of each instance's value in, with the split that it stands in."""
        self._values += len(hashes)
        for code, name in enumerate(splits.names()):
            self._splits.setdefault(name, Distinct()).add(hashes[splits.index == code])

    def repetition(self) -> Repetition:
        """The counts so far."""
        hashes = [distinct.hashes() for distinct in self._splits.values()]
        _, times = np.unique(np.concatenate(hashes or [np.zeros(0, np.uint64)]), return_counts=True)
        return Repetition(values=self._values, distinct=len(times), in_several_splits=int((times > 1).sum()))
