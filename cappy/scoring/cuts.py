"""How many pairs were longer than a scorer reads, said once and not per pair."""

import logging
import threading
from collections.abc import Sequence

from cappy.scoring.encoding import Encoded

LOGGER = logging.getLogger(__name__)


class Cuts:
    """Counts of one scorer: `pairs` it was given, `cut` of these that lost tokens, `responses` that lost their end.

    Equal pairs of a call count once. The first cut is logged, unless `logs` is false because the caller says the count.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.pairs = self.cut = self.responses = 0
        self.logs = True
        self._lock = threading.Lock()

    def count(self, encoded: Sequence[Encoded]) -> None:
        """Adds pairs as they were encoded."""
        cut = sum(not pair.whole for pair in encoded)
        with self._lock:
            first = cut > 0 and self.cut == 0
            self.pairs += len(encoded)
            self.cut += cut
            self.responses += sum(pair.cut for pair in encoded)
        if first and self.logs:
            LOGGER.warning("a pair is longer than the scorer's %d tokens and is cut; further ones too", self.max_length)

    def text(self) -> str:
        """The counts in a sentence; empty where nothing was cut."""
        if not self.cut:
            return ""
        ends = f", {self.responses:,} responses lost their end" if self.responses else ""
        return f"{self.cut:,} of {self.pairs:,} pairs are longer than the scorer's {self.max_length} tokens: cut{ends}"
