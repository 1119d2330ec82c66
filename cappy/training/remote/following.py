"""The loop over a job on any platform: submitted once, looked at, submitted again, cancelled with its step."""

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
"""How long a platform may give no answer while a job runs: an API server that is being replaced is back by then."""
CANCEL_SECONDS = 60.0
"""How long a cancelled job is waited for: the usual grace period of 30 seconds, and some to take the machines down."""
CANCEL_POLL_SECONDS = 0.5
"""How often a wish to cancel is looked for between two looks at the job."""


class Phase(Enum):
    """How far a job is."""

    PENDING = "waits"
    RUNNING = "runs"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "was cancelled"


FINAL_PHASES = (Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED)


@dataclass(frozen=True, slots=True)
class Status:
    """A job's phase and, in the platform's words, why it waits or failed.

    `preempted`: its machines were taken away. `hopeless`: it waits for what will not come, such as an absent image.
    """

    phase: Phase
    reason: str = ""
    preempted: bool = False
    hopeless: bool = False


class Jobs(Protocol):
    """A platform's jobs of one training step. Each call raises UnansweredError where the platform gives no answer."""

    def status(self, name: str) -> Status | None:
        """How the newest job of this name is; None if there is none."""

    def submit(self, name: str) -> None:
        """Submits a job of this name; one that is over goes first. ConfigError with the platform's words."""

    def lines(self, name: str) -> Iterable[tuple[str, str]]:
        """(node, line) of its log since this was asked last; nothing where logs are elsewhere."""

    def cancel(self, name: str) -> None:
        """Ends the job, if there is one: its processes get SIGTERM and the platform's grace period."""

    def address(self, name: str) -> str:
        """Where, or with which command, a person looks at it."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """`max_restarts` submissions after the first, `timeout` and `poll` in seconds."""

    max_restarts: int
    timeout: float
    poll: float


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What the loop asks and tells beside the platform: a test plays it without a clock.

    `checkpoint` is the update of the job's newest checkpoint (-1: none), `cancelled` why this step is to end ("": it is
    not), `written` whether what a job that has succeeded wrote is there, `look` is called at every look at the job.
    """

    checkpoint: Callable[[], int]
    written: Callable[[], bool]
    cancelled: Callable[[], str]
    tell: Callable[[str], None]
    look: Callable[[], None] = lambda: None
    said: Callable[[str], str] = lambda line: ""
    clock: Callable[[], float] = time.monotonic
    pause: Callable[[float], None] = time.sleep


def follow(jobs: Jobs, name: str, limits: Limits, hooks: Hooks) -> None:
    """Returns when the job has succeeded; TrainingError or ConfigError when it never will.

    A job that runs already is followed, one that succeeded already is not submitted, unless what it wrote is gone. One
    that failed is submitted again while its checkpoint moves on, at most `limits.max_restarts` times. When this step is
    to end, so does the job.
    """
    follower = _Follower(jobs, name, limits, hooks)
    try:
        follower.begin()
        while not follower.poll():
            follower.wait()
    except KeyboardInterrupt:
        follower.cancel("Ctrl-C")
        raise


def end_job(jobs: Jobs, name: str, tell: Callable[[str], None]) -> None:
    """Cancels the job if it is still there, and waits until it has ended; TrainingError where it cannot."""
    status = jobs.status(name)
    if status is not None and status.phase not in FINAL_PHASES:
        limits = Limits(max_restarts=0, timeout=0.0, poll=0.0)
        hooks = Hooks(checkpoint=lambda: -1, written=lambda: False, cancelled=lambda: "", tell=tell)
        _Follower(jobs, name, limits, hooks).cancel("its work is done again")


def reason_not_to_resubmit(status: Status, *, at: int, before: int | None, used: int, max_restarts: int) -> str:
    """Why a failed job is not submitted again, "" where it is: it must have got on since it failed before.

    `at` is its checkpoint's update (-1: none), `before` the same when it failed last, `used` the submissions again.
    """
    if at < 0 and not status.preempted:
        return "before its first checkpoint"
    if before is not None and at <= before:
        return f"twice at the checkpoint of update {at}" if at >= 0 else "twice before its first checkpoint"
    if used >= max_restarts:
        return f"after it was submitted {used + 1} times (--max-restarts {max_restarts})"
    return ""


@contextlib.contextmanager
def cancellation() -> Iterator[Callable[[], str]]:
    """A function that says why this step is to end, "" while it is not: SIGTERM came, or the orchestrator's shell went.

    An orchestrator starts a component under `sh -ec`, and its SIGTERM may end the shell alone: the component then has
    another parent. A command that a person started outlives their shell.
    """
    parent = ORCHESTRATOR.get()
    with Shutdown() as shutdown:

        def reason() -> str:
            if shutdown.requested():
                return "this step got SIGTERM"
            if parent is not None and os.getppid() != parent:
                return "the process that started this step is gone"
            return ""

        yield reason


class _Follower:
    """The state of a job between two looks at it."""

    def __init__(self, jobs: Jobs, name: str, limits: Limits, hooks: Hooks) -> None:
        self.jobs, self.name, self.limits, self.hooks = jobs, name, limits, hooks
        self.deadline = hooks.clock() + limits.timeout
        self.answered = hooks.clock()
        self.failed_at: int | None = None
        self.submitted_again = 0
        self.last_note = ""
        self.error = ""
        self.unread = False

    def begin(self) -> None:
        """Finds the job or submits it. A platform that does not answer here is not waited for."""
        status = self.jobs.status(self.name)
        if status is not None and status.phase is Phase.SUCCEEDED and not self.hooks.written():
            # Platforms remember a job for longer than its output may live.
            self.hooks.tell(f"{self.name}: succeeded already, and what it wrote is not there any more")
        elif status is not None and status.phase not in (Phase.FAILED, Phase.CANCELLED):
            self.hooks.tell(f"{self.name}: {status.phase.value} already; {self.jobs.address(self.name)}")
            return
        self._raise_if_over()
        self.jobs.submit(self.name)
        self.hooks.tell(f"{self.name}: submitted; {self.jobs.address(self.name)}")

    def poll(self) -> bool:
        """Looks at the job once."""
        try:
            status = self.jobs.status(self.name)
            self.answered = self.hooks.clock()
        except UnansweredError as error:
            self._raise_if_over()
            if self.hooks.clock() - self.answered > PATIENCE_SECONDS:
                raise
            self._tell_once(f"no answer: {error}")
            return False
        self._tell_lines()
        self.hooks.look()
        if status is None or status.phase is Phase.CANCELLED:
            remedy = "run the same command again to continue at its checkpoint"
            raise TrainingError(f"{self.name}: was cancelled or deleted by someone else; {remedy}")
        if status.phase is not Phase.FAILED:
            self._tell_once(f"{status.phase.value}{status.reason and f': {status.reason}'}")
        if status.phase is Phase.SUCCEEDED:
            return True
        self._raise_if_over()
        if status.hopeless:
            self._cancel()
            raise TrainingError(
                f"{self.name}: {status.reason}; it is cancelled, mend that and run the same command again"
            )
        if status.phase is Phase.FAILED:
            self._submit_again(status)
        return False

    def wait(self) -> None:
        """Until the next look, or until this step is to end."""
        end = self.hooks.clock() + self.limits.poll
        while self.hooks.clock() < end and not self.hooks.cancelled():
            self.hooks.pause(CANCEL_POLL_SECONDS)

    def cancel(self, why: str) -> None:
        """Ends the job and says so."""
        self.hooks.tell(f"{self.name}: {why}, it is being cancelled")
        self._cancel()

    def _raise_if_over(self) -> None:
        if why := self.hooks.cancelled():
            self.cancel(why)
            remedy = "run the same command again to continue at its checkpoint"
            raise TrainingError(f"{self.name}: was cancelled ({why}); {remedy}")
        if self.hooks.clock() > self.deadline:
            self.cancel("its time is up")
            remedy = "give more --timeout-hours to continue at its checkpoint"
            hours = self.limits.timeout / 3600
            raise TrainingError(f"{self.name}: was not done in {hours:g} hours and is cancelled; {remedy}")

    def _cancel(self) -> None:
        """Ends the job and waits until it has ended, so that whoever goes on does not meet it."""
        try:
            self.jobs.cancel(self.name)
            end = self.hooks.clock() + CANCEL_SECONDS
            while self._is_active() and self.hooks.clock() < end:
                self.hooks.pause(CANCEL_POLL_SECONDS)
        except CappyError as error:
            address = self.jobs.address(self.name)
            raise TrainingError(f"{self.name}: could not be cancelled ({error}); do it by hand: {address}") from error
        self._tell_lines()

    def _is_active(self) -> bool:
        status = self.jobs.status(self.name)
        return status is not None and status.phase not in FINAL_PHASES

    def _submit_again(self, status: Status) -> None:
        at = self.hooks.checkpoint()
        words = "was preempted" if status.preempted else "failed"
        reason = f" ({status.reason})" if status.reason else ""
        if self.error and not status.preempted:
            raise TrainingError(f"{self.name}: {self.error}")
        rules = {"before": self.failed_at, "used": self.submitted_again, "max_restarts": self.limits.max_restarts}
        if why := reason_not_to_resubmit(status, at=at, **rules):  # type: ignore[arg-type]
            remedy = f"look at its log ({self.jobs.address(self.name)}), then run the same command again"
            raise TrainingError(f"{self.name}: {words}{reason} {why}; {remedy}")
        self.failed_at, self.submitted_again, self.error = at, self.submitted_again + 1, ""
        place = f"the checkpoint of update {at}" if at >= 0 else "the start"
        self.hooks.tell(f"{self.name}: {words}{reason}, submitted again to continue at {place}")
        self.jobs.submit(self.name)

    def _tell_lines(self) -> None:
        try:
            for node, line in self.jobs.lines(self.name):
                self.hooks.tell(f"{node}: {line}")
                self.error = self.hooks.said(line) or self.error
        except UnansweredError:  # The next look asks for these lines again.
            return
        except ConfigError as error:  # A right that is missing for the log alone must not end a training.
            if not self.unread:
                self.hooks.tell(f"{self.name}: its log cannot be read ({error})")
            self.unread = True

    def _tell_once(self, text: str) -> None:
        if text != self.last_note:
            self.last_note = text
            self.hooks.tell(f"{self.name}: {text}")
