"""Rate limits, size limits, the budget of a run, and usage counts for endpoints."""

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
"""Time between two reads of the ledgers of other processes, whose folder may be on a slow network volume."""

MAX_ANSWER_BYTES = 32_000_000
"""Maximum size of a decoded body."""
MAX_ERROR_BYTES = 1_000_000
"""Maximum size of a body with a status other than 200."""
MAX_LIST_BYTES = 8_000_000
"""Maximum size of a list of models."""
MIN_ANSWER_BYTES = 1_000_000
"""Part of the maximum size that does not depend on the number of tokens."""
TOKEN_BYTES = 100
LOGPROB_BYTES = 400
"""Maximum JSON size of a token, and of each of its log-probabilities."""
UNKNOWN_TOKENS = 32_768
"""Assumed tokens of a response if the request sets no limit."""
MAX_CORRECTION_SECONDS = 600.0
"""Maximum delay of later requests because one answer used more tokens than estimated."""


def answer_bytes(tokens: int | None, count: int, *, likelihoods: int = 0) -> int:
    """Maximum size of an answer in bytes, for `count` responses of up to `tokens` tokens (None: no limit).

    `likelihoods` is the number of log-probabilities per token.
    """
    bytes_per_token = TOKEN_BYTES + LOGPROB_BYTES * likelihoods
    return min(MAX_ANSWER_BYTES, MIN_ANSWER_BYTES + count * (tokens or UNKNOWN_TOKENS) * bytes_per_token)


class StoppedError(Exception):
    """The run was stopped by another request; this one is not sent."""


class RateLimiter:
    """Limits the rate to `per_minute` units, spread evenly; 0 means no limit."""

    def __init__(self, per_minute: int) -> None:
        self._seconds_per_unit = 60 / per_minute if per_minute else 0.0
        self._next_free = 0.0
        self._lock = threading.Lock()

    def reserve(self, units: int) -> float:
        """Reserves these units; returns the seconds to wait before using them."""
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next_free)
            self._next_free = start + units * self._seconds_per_unit
            return start - now

    def correct(self, units: int) -> None:
        """Corrects a reservation by the difference between used and reserved units.

        Adds at most `MAX_CORRECTION_SECONDS`, because the server may report any number.
        """
        with self._lock:
            self._next_free += min(units * self._seconds_per_unit, MAX_CORRECTION_SECONDS)


def pause(seconds: float, stop: threading.Event) -> None:
    """Waits this long. Raises StoppedError as soon as `stop` is set."""
    if stop.wait(seconds) if seconds > 0 else stop.is_set():
        raise StoppedError


@dataclass(slots=True)
class Spending:
    """Requests and tokens that were used, or that are reserved."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def add(self, other: "Spending", sign: int = 1) -> None:
        """Adds `other`, or subtracts it with `sign` -1."""
        self.requests += sign * other.requests
        self.input_tokens += sign * other.input_tokens
        self.output_tokens += sign * other.output_tokens


class Budget:
    """The budget of a run, shared by all its processes and restarts.

    The maximum usage of a request is reserved before it is sent, so that concurrent requests cannot exceed the budget
    together. Spending is written to a ledger, one file per process in the run's folder, and other processes see it
    within `REFRESH_SECONDS`.
    """

    def __init__(self, name: str, config: EndpointConfig) -> None:
        self._name = name
        self._config = config
        self._reserved = Spending()
        self._own_spending = Spending()
        self._other_spending = Spending()
        self._read_offsets: dict[Path, int] = {}
        self._refreshed = 0.0
        self._condition = threading.Condition()
        self._folder = config.folder / "spent" / (config.run or "unnamed") if config.folder else None
        self._ledger_path = self._folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.txt" if self._folder else None
        self._ledger_fd: int | None = None
        self.refresh()

    def refresh(self) -> None:
        """Reads new ledger lines of earlier and other processes."""
        self._refreshed = time.monotonic()
        for path in sorted(self._folder.glob("*.txt")) if self._folder else ():
            if path == self._ledger_path:
                continue
            with path.open("rb") as file:
                file.seek(self._read_offsets.get(path, 0))
                complete_lines = file.read().rpartition(b"\n")[0]
            self._read_offsets[path] = self._read_offsets.get(path, 0) + len(complete_lines) + bool(complete_lines)
            for line in complete_lines.splitlines():
                values = [int(number) for number in line.split()]
                if len(values) == 3:
                    self._other_spending.add(Spending(*values))

    @contextlib.contextmanager
    def reserve(self, reservation: Spending, stop: threading.Event) -> Iterator[Spending]:
        """Reserves the maximum usage of a block; the block adds its actual usage to the yielded `Spending`.

        Waits while pending requests may still release budget. If they cannot, sets `stop` and raises GeneratorError.
        """
        with self._condition:
            if time.monotonic() - self._refreshed > REFRESH_SECONDS:
                self.refresh()
            while (message := self._exceeded_message(reservation)) is not None:
                if not self._reserved.requests:
                    stop.set()
                    raise GeneratorError(message)
                self._condition.wait(0.2)
                if stop.is_set():
                    raise StoppedError
            self._reserved.add(reservation)
        spent = Spending()
        try:
            yield spent
        finally:
            with self._condition:
                self._reserved.add(reservation, -1)
                if spent.requests:
                    self._own_spending.add(spent)
                    self._write_ledger(spent)
                self._condition.notify_all()

    def _exceeded_message(self, reservation: Spending) -> str | None:
        """The error message if `reservation` exceeds the remaining budget, else None."""
        spent, after = Spending(), Spending()
        spent.add(self._own_spending)
        spent.add(self._other_spending)
        for spending in (spent, self._reserved, reservation):
            after.add(spending)
        config = self._config
        kinds = (
            ("requests", "requests", config.max_total_requests, spent.requests, after.requests),
            ("tokens", "tokens", config.max_total_tokens, _tokens(spent), _tokens(after)),
            ("money", "cost", config.max_total_cost, _cost(spent, config), _cost(after, config)),
        )
        for kind, flag, budget, used, total in kinds:
            if budget and total > budget * (1 + 1e-9):
                remaining = f"{budget - used:,.6g}"
                return (
                    f"{self._name}: the budget of {budget:,.10g} {kind} is used up ({remaining} left, the next request "
                    f"may use more); raise --max-total-{flag} and run the same command again: every answer is kept"
                )
        return None

    def close(self) -> None:
        """Closes the ledger."""
        if self._ledger_fd is not None:
            os.close(self._ledger_fd)
            self._ledger_fd = None

    def _write_ledger(self, spent: Spending) -> None:
        if self._ledger_path is None:
            return
        with disk_errors(self._ledger_path):
            if self._ledger_fd is None:
                self._ledger_path.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
                self._ledger_fd = os.open(self._ledger_path, flags, 0o600)
            os.write(self._ledger_fd, f"{spent.requests} {spent.input_tokens} {spent.output_tokens}\n".encode())


def _tokens(spent: Spending) -> int:
    return spent.input_tokens + spent.output_tokens


def _cost(spent: Spending, config: EndpointConfig) -> float:
    return config.cost(spent.input_tokens, spent.output_tokens)


ERROR_SECONDS = 30.0
"""Time for which an error is shown although the endpoint has answered since."""


class UsageMeter:
    """Counts the usage of an endpoint, and keeps the reason of its last failed attempt; thread-safe."""

    def __init__(self, config: EndpointConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._usage = Usage()
        self._failed_at = self._answered_at = 0.0

    def add_error(self, reason: str) -> None:
        """Counts a failed attempt."""
        with self._lock:
            self._usage = replace(self._usage, errors=self._usage.errors + 1, last_error=reason)
            self._failed_at = time.monotonic()

    def add(self, **increments: int) -> None:
        """Adds to these fields of `Usage`; `requests` are answered ones."""
        with self._lock:
            if "requests" in increments:
                self._answered_at = time.monotonic()
            totals = {name: getattr(self._usage, name) + value for name, value in increments.items()}
            self._usage = replace(self._usage, **totals)

    @property
    def usage(self) -> Usage:
        """The usage so far, with its cost, and with the last error if that is still of interest."""
        with self._lock:
            usage, failed_at, answered_at = self._usage, self._failed_at, self._answered_at
        is_old = answered_at > failed_at and time.monotonic() - failed_at > ERROR_SECONDS
        return replace(
            usage,
            last_error="" if is_old else usage.last_error,
            cost=self._config.cost(usage.input_tokens, usage.output_tokens),
        )
