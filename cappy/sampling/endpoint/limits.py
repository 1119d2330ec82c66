"""How fast an endpoint may be asked, how large an answer may be, how much a run may take, and what was used."""

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cappy.errors import GeneratorError
from cappy.records.folder import disk_errors
from cappy.sampling.generators import EndpointConfig, Usage

REFRESH_SECONDS = 2.0
"""How long another process's requests may stay unseen; looking costs a listing of a folder that may be far away."""

MAX_ANSWER_BYTES = 32_000_000
"""Of a body, decoded, whatever was asked for."""
MAX_ERROR_BYTES = 1_000_000
"""Of a body with a status that is not 200."""
MAX_LIST_BYTES = 8_000_000
"""Of a list of models."""
MIN_ANSWER_BYTES = 1_000_000
TOKEN_BYTES = 100
LOGPROB_BYTES = 400
"""What a token of a response takes in JSON at most, without and with its log-probability."""
UNKNOWN_TOKENS = 32_768
"""Assumed length of a response where the request sets no limit."""
MAX_CORRECTION_SECONDS = 600.0
"""Seconds that one answer may hold up the next ones because it took more than it was expected to."""


def answer_bytes(tokens: int | None, count: int, *, likelihoods: int = 0) -> int:
    """How many bytes an answer may have: `count` responses of `tokens` tokens (None: nobody limits them).

    `likelihoods` is the number of log-probabilities that come with each token.
    """
    each = TOKEN_BYTES + LOGPROB_BYTES * likelihoods
    return min(MAX_ANSWER_BYTES, MIN_ANSWER_BYTES + count * (tokens or UNKNOWN_TOKENS) * each)


class StoppedError(Exception):
    """Another request ended the run; this one is not sent."""


class RateLimiter:
    """Lets `per_minute` units through each minute, evenly and from the first one; 0 lets all through."""

    def __init__(self, per_minute: int) -> None:
        self._seconds = 60 / per_minute if per_minute else 0.0
        self._free = 0.0
        self._lock = threading.Lock()

    def reserve(self, units: int) -> float:
        """Seconds to wait until these units may pass; their place is taken."""
        with self._lock:
            now = time.monotonic()
            start = max(now, self._free)
            self._free = start + units * self._seconds
            return start - now

    def correct(self, units: int) -> None:
        """Makes up for units (positive: more, negative: fewer) that a turn took beside what it had asked for.

        A server's word is taken for `MAX_CORRECTION_SECONDS` at most: it may say any number.
        """
        with self._lock:
            self._free += min(units * self._seconds, MAX_CORRECTION_SECONDS)


def pause(seconds: float, stop: threading.Event) -> None:
    """Waits; StoppedError as soon as the run is."""
    if stop.wait(seconds) if seconds > 0 else stop.is_set():
        raise StoppedError


@dataclass(slots=True)
class Spending:
    """What was used, or may be."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def add(self, other: "Spending", sign: int = 1) -> None:
        """Adds the other, or takes it away."""
        self.requests += sign * other.requests
        self.input_tokens += sign * other.input_tokens
        self.output_tokens += sign * other.output_tokens


class Budget:
    """What a run may spend, over all its starts and processes.

    Before a request is sent the most that it may take is held back, so that requests in flight cannot overrun the
    budget together; other processes' requests are seen within `REFRESH_SECONDS` of their answer. What was answered is
    written to a ledger, a file per process under the run's name.
    """

    def __init__(self, name: str, config: EndpointConfig) -> None:
        self._name = name
        self._config = config
        self._held = Spending()
        self._own = Spending()
        self._others = Spending()
        self._read: dict[Path, int] = {}
        self._refreshed = 0.0
        self._change = threading.Condition()
        self._folder = config.folder / "spent" / (config.run or "unnamed") if config.folder else None
        self._file = self._folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.txt" if self._folder else None
        self._ledger: int | None = None
        self.refresh()

    def refresh(self) -> None:
        """Reads what earlier starts and other processes have added to the ledger."""
        self._refreshed = time.monotonic()
        for path in sorted(self._folder.glob("*.txt")) if self._folder else ():
            if path == self._file:
                continue
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                whole = file.read().rpartition(b"\n")[0]
            self._read[path] = self._read.get(path, 0) + len(whole) + bool(whole)
            for line in whole.splitlines():
                numbers = [int(number) for number in line.split()]
                if len(numbers) == 3:
                    self._others.add(Spending(*numbers))

    @contextlib.contextmanager
    def reserve(self, most: Spending, stop: threading.Event) -> Iterator[Spending]:
        """Holds `most` back while the block asks; what the block adds to the value given is spent.

        Waits while requests in flight may still leave room; where they cannot, `stop` is set and GeneratorError says
        the remedy.
        """
        with self._change:
            if time.monotonic() - self._refreshed > REFRESH_SECONDS:
                self.refresh()
            while (short := self._short(most)) is not None:
                if not self._held.requests:
                    stop.set()
                    raise GeneratorError(short)
                self._change.wait(0.2)
                if stop.is_set():
                    raise StoppedError
            self._held.add(most)
        spent = Spending()
        try:
            yield spent
        finally:
            with self._change:
                self._held.add(most, -1)
                if spent.requests:
                    self._own.add(spent)
                    self._note(spent)
                self._change.notify_all()

    def _short(self, most: Spending) -> str | None:
        """What to say where `most` does not fit beside what is spent and held."""
        spent, after = Spending(), Spending()
        spent.add(self._own)
        spent.add(self._others)
        for part in (spent, self._held, most):
            after.add(part)
        config = self._config
        kinds = (
            ("requests", "requests", config.max_total_requests, spent.requests, after.requests),
            ("tokens", "tokens", config.max_total_tokens, _tokens(spent), _tokens(after)),
            ("money", "cost", config.max_total_cost, _money(spent, config), _money(after, config)),
        )
        for kind, flag, budget, used, would_be in kinds:
            if budget and would_be > budget * (1 + 1e-9):
                left = f"{budget - used:,.6g}"
                return (
                    f"{self._name}: the budget of {budget:,.10g} {kind} is used up ({left} left, less than the next "
                    f"request may take); raise --max-total-{flag} and run the same command again: every answer is kept"
                )
        return None

    def close(self) -> None:
        """Closes the ledger."""
        if self._ledger is not None:
            os.close(self._ledger)
            self._ledger = None

    def _note(self, spent: Spending) -> None:
        if self._file is None:
            return
        with disk_errors(self._file):
            if self._ledger is None:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
                self._ledger = os.open(self._file, flags, 0o600)
            os.write(self._ledger, f"{spent.requests} {spent.input_tokens} {spent.output_tokens}\n".encode())


def _tokens(spent: Spending) -> int:
    return spent.input_tokens + spent.output_tokens


def _money(spent: Spending, config: EndpointConfig) -> float:
    return config.cost(spent.input_tokens, spent.output_tokens)


class UsageMeter:
    """Counts what is used; several threads may count at once."""

    def __init__(self, config: EndpointConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._usage = Usage()

    def add(self, **more: int) -> None:
        """Adds to these fields of the usage."""
        with self._lock:
            now = {name: getattr(self._usage, name) + value for name, value in more.items()}
            self._usage = replace(self._usage, **now)

    @property
    def usage(self) -> Usage:
        """What was counted so far, with its cost."""
        usage = self._usage
        return replace(usage, cost=self._config.cost(usage.input_tokens, usage.output_tokens))
