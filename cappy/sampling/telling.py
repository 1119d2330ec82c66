"""How far sampling is, while a part is under way too: instances, candidates, tokens, errors, cost."""

import time
from collections.abc import Sequence

from cappy.progress import Progress
from cappy.sampling.generators import Generator
from cappy.sampling.paid import Paid
from cappy.sampling.strategies import Decoding, share


class Telling:
    """The progress of the step's parts, with the candidates of the part under way counted in.

    Rates and amounts are of this start alone; what earlier starts paid for stands in the manifest at the end.
    """

    def __init__(self, progress: Progress, generators: Sequence[Generator], decodings: Sequence[Decoding]) -> None:
        self._progress = progress
        self._paid = [generator for generator in generators if isinstance(generator, Paid)]
        own = [share(decodings, position) for position in range(len(generators))]
        self._each = sum(decoding.num_samples for of_one in own for decoding in of_one)
        self._started = time.monotonic()
        self._candidates = self._within = 0
        self._done = self._resumed = 0
        self._total: int | None = None

    def __call__(
        self, done: int, total: int | None = None, *, unit: str = "instances", resumed: int = 0, note: str = ""
    ) -> None:
        """A part is done, as `Progress` says it."""
        self._done, self._total, self._resumed = done, total, resumed
        self._within = 0
        self._tell()

    def drawn(self, candidates: int) -> None:
        """So many more candidates have come."""
        self._candidates += candidates
        self._within += candidates
        self._tell()

    def _tell(self) -> None:
        within = self._within // self._each if self._each else 0
        done = self._done + within if self._total is None else min(self._done + within, self._total)
        self._progress(done, self._total, unit="instances", resumed=self._resumed, note=self._note())

    def _note(self) -> str:
        if not self._candidates:
            return ""
        seconds = max(time.monotonic() - self._started, 1e-9)
        parts = [f"{self._candidates:,} candidates ({self._candidates / seconds:,.3g}/s)"]
        if self._paid:
            used = [generator.usage for generator in self._paid]
            tokens = f"{sum(u.input_tokens for u in used):,} tokens in, {sum(u.output_tokens for u in used):,} out"
            parts += [tokens, f"{sum(u.errors for u in used):,} errors"]
            if cost := sum(u.cost for u in used):
                parts.append(f"cost {cost:,.4g}")
        return ", ".join(parts)
