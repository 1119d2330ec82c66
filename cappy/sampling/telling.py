"""How far sampling is, while a part is under way too: instances, candidates, tokens, errors, cost."""

import threading
import time
from collections.abc import Sequence
from types import TracebackType

from cappy.progress import Progress, duration
from cappy.sampling.generators import Generator
from cappy.sampling.paid import Paid
from cappy.sampling.strategies import Decoding, share

HEARTBEAT_SECONDS = 4.0
"""The progress is said again at least that often, whatever a generator is busy with."""


class Telling:
    """The progress of the step's parts, with the candidates of the part under way counted in.

    Rates and amounts are of this start alone; what earlier starts paid for stands in the manifest at the end. Within a
    `with` block a thread says the progress again where a generator is silent for long.
    """

    def __init__(self, progress: Progress, generators: Sequence[Generator], decodings: Sequence[Decoding]) -> None:
        self._progress = progress
        self._paid = [generator for generator in generators if isinstance(generator, Paid)]
        own = [share(decodings, position) for position in range(len(generators))]
        self._each = sum(decoding.num_samples for of_one in own for decoding in of_one)
        self._started = time.monotonic()
        self._candidates = self._within = 0
        self._begun = 0.0
        self._done = self._resumed = 0
        self._total: int | None = None
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Telling":
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._heart.join()

    def __call__(
        self, done: int, total: int | None = None, *, unit: str = "instances", resumed: int = 0, note: str = ""
    ) -> None:
        """A part is done, as `Progress` says it."""
        with self._lock:
            self._done, self._total, self._resumed = done, total, resumed
            self._within, self._begun = 0, 0.0
            self._tell()

    def drawn(self, candidates: int, /, *, begun: float = 0.0) -> None:
        """So many more candidates have come; those under way are `begun` candidates' worth of work."""
        with self._lock:
            self._candidates += candidates
            self._within += candidates
            self._begun = begun
            self._tell()

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT_SECONDS):
            with self._lock:
                try:
                    self._tell()
                except OSError:  # The step itself meets it with its next candidates.
                    return

    def _tell(self) -> None:
        within = int(self._work()) if self._each else 0
        done = self._done + within if self._total is None else min(self._done + within, self._total)
        self._progress(done, self._total, unit="instances", resumed=self._resumed, note=self._note(done))

    def _work(self) -> float:
        """Instances' worth of work done of the part under way."""
        return (self._within + self._begun) / self._each

    def _note(self, done: int) -> str:
        if not self._candidates and not self._begun:
            return ""
        seconds = max(time.monotonic() - self._started, 1e-9)
        parts = [f"{self._candidates:,} candidates ({self._candidates / seconds:,.3g}/s)"]
        if done == self._resumed and self._total and self._each and self._work():
            # Not one instance yet, so that nobody else can tell how long the rest takes.
            left = seconds / self._work() * (self._total - self._resumed) - seconds
            parts.append(f"{duration(max(left, 0.0))} left")
        if self._paid:
            used = [generator.usage for generator in self._paid]
            tokens = f"{sum(u.input_tokens for u in used):,} tokens in, {sum(u.output_tokens for u in used):,} out"
            parts += [tokens, f"{sum(u.errors for u in used):,} errors"]
            if cost := sum(u.cost for u in used):
                parts.append(f"cost {cost:,.4g}")
        return ", ".join(parts)
