"""Follows a job on any platform: submits it, polls it, resubmits it after a failure, cancels it with its step."""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from cappy.errors import CappyError, ConfigError, TrainingError, UnansweredError
from cappy.runs import ORCHESTRATOR
from cappy.training.checkpoint import Shutdown

PATIENCE_SECONDS = 600.0
"""How long a platform may be unreachable while a job runs, for example while its API server is replaced."""
CANCEL_SECONDS = 60.0
"""How long to wait until a cancelled job ends: the usual grace period of 30 seconds, and time to release machines."""
CANCEL_POLL_SECONDS = 0.5
"""Seconds between checks for cancellation while waiting for the next poll."""


class Phase(Enum):
    """The phase of a job."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINAL_PHASES = (Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED)


@dataclass(frozen=True, slots=True)
class Status:
    """The phase of a job, and the platform's reason if it is pending or failed.

    `preempted`: its machines were taken away. `cannot_start`: it waits for something that will not come, such as an
    image that does not exist.
    """

    phase: Phase
    reason: str = ""
    preempted: bool = False
    cannot_start: bool = False


class Jobs(Protocol):
    """The jobs of one training step on a platform. Each call raises UnansweredError if the platform gives no answer."""

    def status(self, name: str) -> Status | None:
        """The status of the newest job of this name; None if there is none."""

    def submit(self, name: str) -> None:
        """Submits a job of this name, replacing one that has ended; raises ConfigError with the platform's message."""

    def lines(self, name: str) -> Iterable[tuple[str, str]]:
        """(node, line) of the log since the last call; nothing if the log cannot be read here."""

    def cancel(self, name: str) -> None:
        """Cancels the job, if there is one: its processes get SIGTERM and the platform's grace period."""

    def url_or_command(self, name: str) -> str:
        """The URL or the command that shows the job."""


@dataclass(frozen=True, kw_only=True)
class PollLimits:
    """The maximum number of resubmissions, the time limit of the job and the polling interval, both in seconds."""

    max_restarts: int
    timeout: float
    poll: float


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """The functions that the loop calls, other than those of the platform; tests replace `clock` and `sleep`.

    `checkpoint_update` returns the update of the job's newest checkpoint, -1 if there is none; `output_exists` whether
    the output of a job that succeeded exists; `cancel_reason` why this step must end, "" if it need not; `find_error`
    the error in a log line that the user must fix, "" if there is none. `on_poll` is called at every poll.
    """

    checkpoint_update: Callable[[], int]
    output_exists: Callable[[], bool]
    cancel_reason: Callable[[], str]
    log: Callable[[str], None]
    on_poll: Callable[[], None] = lambda: None
    find_error: Callable[[str], str] = lambda line: ""
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


def follow(jobs: Jobs, name: str, limits: PollLimits, hooks: Hooks) -> None:
    """Submits the job if needed and returns when it has succeeded; raises TrainingError or ConfigError if it cannot.

    A running job is followed; a job that has succeeded is not submitted again unless its output is gone. A failed job
    is resubmitted as long as its checkpoint advances, at most `limits.max_restarts` times. If this step must end, the
    job is cancelled.
    """
    follower = _Follower(jobs, name, limits, hooks)
    try:
        follower.begin()
        while not follower.poll():
            follower.wait()
    except KeyboardInterrupt:
        follower.cancel("Ctrl-C")
        raise


def end_job(jobs: Jobs, name: str, log: Callable[[str], None]) -> None:
    """Cancels the job if it is active and waits until it has ended; raises TrainingError if that fails."""
    status = jobs.status(name)
    if status is not None and status.phase not in FINAL_PHASES:
        limits = PollLimits(max_restarts=0, timeout=0.0, poll=0.0)
        hooks = Hooks(checkpoint_update=lambda: -1, output_exists=lambda: False, cancel_reason=lambda: "", log=log)
        _Follower(jobs, name, limits, hooks).cancel("its work starts over")


def reason_not_to_resubmit(
    status: Status, *, update: int, previous_update: int | None, resubmissions: int, max_restarts: int
) -> str:
    """Why a failed job is not resubmitted, as the end of "it failed ..."; "" if it is resubmitted.

    Its checkpoint must have advanced since the last failure. `update` is the update of its checkpoint, -1 if there is
    none; `previous_update` is that at the previous failure, None if this is the first one.
    """
    if update < 0 and not status.preempted:
        return "before its first checkpoint"
    if previous_update is not None and update <= previous_update:
        return f"twice at the checkpoint of update {update}" if update >= 0 else "twice before its first checkpoint"
    if resubmissions >= max_restarts:
        return f"after it was submitted {resubmissions + 1} times (--max-restarts {max_restarts})"
    return ""


@contextlib.contextmanager
def cancellation() -> Iterator[Callable[[], str]]:
    """Yields a function that returns why this step must end, "" if it need not.

    It must end on SIGTERM, and when the orchestrator's shell has ended: an orchestrator starts a component under
    `sh -ec`, and its SIGTERM may end only the shell; the component then has another parent. A command that a user
    started may outlive the user's shell.
    """
    orchestrator_pid = ORCHESTRATOR.get()
    with Shutdown() as shutdown:

        def reason() -> str:
            if shutdown.requested():
                return "this step received SIGTERM"
            if orchestrator_pid is not None and os.getppid() != orchestrator_pid:
                return "the process that started this step has ended"
            return ""

        yield reason


class _Follower:
    """Follows one job; keeps the state between polls."""

    def __init__(self, jobs: Jobs, name: str, limits: PollLimits, hooks: Hooks) -> None:
        self.jobs, self.name, self.limits, self.hooks = jobs, name, limits, hooks
        self.deadline = hooks.clock() + limits.timeout
        self.last_answer = hooks.clock()
        self.failed_update: int | None = None
        self.resubmissions = 0
        self.last_note = ""
        self.error = ""
        self.log_unreadable = False

    def begin(self) -> None:
        """Finds the job or submits it; raises at once if the platform does not answer."""
        status = self.jobs.status(self.name)
        if status is not None and status.phase is Phase.SUCCEEDED and not self.hooks.output_exists():
            # Platforms may keep a job longer than its output exists.
            self.hooks.log(f"{self.name}: succeeded already, but its output no longer exists")
        elif status is not None and status.phase not in (Phase.FAILED, Phase.CANCELLED):
            self.hooks.log(f"{self.name}: {status.phase.value} already; {self.jobs.url_or_command(self.name)}")
            return
        self._raise_if_must_end()
        self.jobs.submit(self.name)
        self.hooks.log(f"{self.name}: submitted; {self.jobs.url_or_command(self.name)}")

    def poll(self) -> bool:
        """Polls the job once; returns whether it has succeeded."""
        try:
            status = self.jobs.status(self.name)
            self.last_answer = self.hooks.clock()
        except UnansweredError as error:
            self._raise_if_must_end()
            if self.hooks.clock() - self.last_answer > PATIENCE_SECONDS:
                raise
            self._log_once(f"no answer: {error}")
            return False
        self._log_lines()
        self.hooks.on_poll()
        if status is None or status.phase is Phase.CANCELLED:
            remedy = "run the same command again to continue from its checkpoint"
            raise TrainingError(f"{self.name}: was cancelled or deleted by someone else; {remedy}")
        if status.phase is not Phase.FAILED:
            self._log_once(f"{status.phase.value}{status.reason and f': {status.reason}'}")
        if status.phase is Phase.SUCCEEDED:
            return True
        self._raise_if_must_end()
        if status.cannot_start:
            self._cancel()
            raise TrainingError(
                f"{self.name}: {status.reason}; the job was cancelled; fix that and run the same command again"
            )
        if status.phase is Phase.FAILED:
            self._submit_again(status)
        return False

    def wait(self) -> None:
        """Waits for the next poll, or until this step must end."""
        end = self.hooks.clock() + self.limits.poll
        while self.hooks.clock() < end and not self.hooks.cancel_reason():
            self.hooks.sleep(CANCEL_POLL_SECONDS)

    def cancel(self, reason: str) -> None:
        """Cancels the job and logs the reason."""
        self.hooks.log(f"{self.name}: cancelling the job: {reason}")
        self._cancel()

    def _raise_if_must_end(self) -> None:
        """Cancels the job and raises TrainingError if this step must end or the time limit is exceeded."""
        if reason := self.hooks.cancel_reason():
            self.cancel(reason)
            remedy = "run the same command again to continue from its checkpoint"
            raise TrainingError(f"{self.name}: was cancelled ({reason}); {remedy}")
        if self.hooks.clock() > self.deadline:
            self.cancel("it reached its time limit")
            remedy = "give more --timeout-hours to continue from its checkpoint"
            hours = self.limits.timeout / 3600
            raise TrainingError(f"{self.name}: did not finish in {hours:g} hours and was cancelled; {remedy}")

    def _cancel(self) -> None:
        """Cancels the job and waits until it has ended, so that the next run does not find it running."""
        try:
            self.jobs.cancel(self.name)
            end = self.hooks.clock() + CANCEL_SECONDS
            while self._is_active() and self.hooks.clock() < end:
                self.hooks.sleep(CANCEL_POLL_SECONDS)
        except CappyError as error:
            url_or_command = self.jobs.url_or_command(self.name)
            raise TrainingError(
                f"{self.name}: could not be cancelled ({error}); cancel it by hand: {url_or_command}"
            ) from error
        self._log_lines()

    def _is_active(self) -> bool:
        status = self.jobs.status(self.name)
        return status is not None and status.phase not in FINAL_PHASES

    def _submit_again(self, status: Status) -> None:
        """Resubmits a failed job; raises TrainingError if that is pointless or not allowed."""
        update = self.hooks.checkpoint_update()
        event = "was preempted" if status.preempted else "failed"
        reason = f" ({status.reason})" if status.reason else ""
        if self.error and not status.preempted:
            raise TrainingError(f"{self.name}: {self.error}")
        refusal = reason_not_to_resubmit(
            status,
            update=update,
            previous_update=self.failed_update,
            resubmissions=self.resubmissions,
            max_restarts=self.limits.max_restarts,
        )
        if refusal:
            remedy = f"check its log ({self.jobs.url_or_command(self.name)}), then run the same command again"
            raise TrainingError(f"{self.name}: {event}{reason} {refusal}; {remedy}")
        self.failed_update, self.resubmissions, self.error = update, self.resubmissions + 1, ""
        position = f"the checkpoint of update {update}" if update >= 0 else "the start"
        self.hooks.log(f"{self.name}: {event}{reason}, submitted again to continue from {position}")
        self.jobs.submit(self.name)

    def _log_lines(self) -> None:
        """Logs the job's new log lines, and remembers an error in them that the user must fix."""
        try:
            for node, line in self.jobs.lines(self.name):
                self.hooks.log(f"{node}: {line}")
                self.error = self.hooks.find_error(line) or self.error
        except UnansweredError:  # The next poll asks for these lines again.
            return
        except ConfigError as error:  # A missing permission for the log must not end a training.
            if not self.log_unreadable:
                self.hooks.log(f"{self.name}: its log cannot be read ({error})")
            self.log_unreadable = True

    def _log_once(self, text: str) -> None:
        if text != self.last_note:
            self.last_note = text
            self.hooks.log(f"{self.name}: {text}")
