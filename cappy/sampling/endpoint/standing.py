"""Whether an endpoint answers at present, by which a refusal is found to be about one request or about all."""

import threading
import time

STREAK = 20
"""Refusals in a row after which a plain question is asked."""
PROBE = "Answer with one word: yes."
"""The plain question: nothing in it can be refused for what it says or for its length."""


class Standing:
    """Counts answers and refusals; several threads may count at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._refused = 0
        self._last_answer: float | None = None

    def answered(self) -> None:
        """A request was answered, now or in an earlier run."""
        with self._lock:
            self._refused = 0
            self._last_answer = time.monotonic()

    def refused(self) -> bool:
        """A request was refused; True where it is time to ask a plain question."""
        with self._lock:
            self._refused += 1
            return self._refused % STREAK == 0

    @property
    def has_answered(self) -> bool:
        """Whether any request was answered."""
        return self._last_answer is not None

    def answered_since(self, moment: float) -> bool:
        """Whether a request was answered after this moment of `time.monotonic`."""
        last = self._last_answer
        return last is not None and last > moment
