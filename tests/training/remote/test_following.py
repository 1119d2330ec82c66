"""The loop over a job: submitted once, followed, submitted again while it gets on, cancelled with its step."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from wording import assert_names

from cappy.errors import ConfigError, TrainingError, UnansweredError
from cappy.training.remote.following import (
    CANCEL_SECONDS,
    PATIENCE_SECONDS,
    Hooks,
    Phase,
    PollLimits,
    Status,
    follow,
    reason_not_to_resubmit,
)

NAME = "cappy-finetuning-0"
PENDING, RUNNING = Status(Phase.PENDING), Status(Phase.RUNNING)
SUCCEEDED, CANCELLED = Status(Phase.SUCCEEDED), Status(Phase.CANCELLED)
FAILED, PREEMPTED = Status(Phase.FAILED, "node-0: Error"), Status(Phase.FAILED, "gone", preempted=True)
Look = Status | BaseException | None


class Played:
    """A platform that shows these states one after another, the last for ever, and a clock that turns with `pause`."""

    def __init__(self, *looks: Look, lines: Sequence[Sequence[tuple[str, str]]] = ()) -> None:
        self.looks, self.later_lines = list(looks), list(lines)
        self.did: list[str] = []
        self.said: list[str] = []
        self.now = 0.0
        self.checkpoints: Iterable[int] = iter([])
        self.written = True
        self.cancelled_at: Callable[[], str] = lambda: ""

    def status(self, name: str) -> Status | None:
        assert name == NAME
        look = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        if isinstance(look, BaseException):
            raise look
        return look

    def submit(self, name: str) -> None:
        self.did.append("submit")

    def lines(self, name: str) -> list[tuple[str, str]]:
        return list(self.later_lines.pop(0)) if self.later_lines else []

    def cancel(self, name: str) -> None:
        self.did.append("cancel")
        self.looks = [None]

    def url_or_command(self, name: str) -> str:
        return "there"

    def pause(self, seconds: float) -> None:
        self.now += seconds

    def follow(self, **limits: Any) -> None:
        checkpoints = iter(self.checkpoints)
        hooks = Hooks(
            checkpoint_update=lambda: next(checkpoints),
            cancel_reason=lambda: self.cancelled_at(),
            output_exists=lambda: self.written,
            log=self.said.append,
            find_error=lambda line: line.partition("cappy finetuning: ")[2],
            clock=lambda: self.now,
            sleep=self.pause,
        )
        follow(self, NAME, PollLimits(**{"max_restarts": 5, "timeout": 36_000.0, "poll": 5.0, **limits}), hooks)


def ended(played: Played, kind: type[Exception] = TrainingError, **limits: Any) -> str:
    with pytest.raises(kind) as caught:
        played.follow(**limits)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_job_is_submitted_once_and_followed_to_its_end_with_every_line_of_its_nodes() -> None:
    played = Played(
        None,
        PENDING,
        RUNNING,
        RUNNING,
        SUCCEEDED,
        lines=[[], [("node-0", "a"), ("node-1", "b")], [], [("node-0", "c")]],
    )
    played.follow()
    assert played.did == ["submit"]
    assert_names(played.said[0], NAME, "submitted", "there")
    actual = [f"{NAME}: {status.phase.value}" for status in (PENDING, RUNNING, SUCCEEDED)]
    assert played.said[1:] == [actual[0], "node-0: a", "node-1: b", actual[1], "node-0: c", actual[2]]


@pytest.mark.parametrize("result", [PENDING, RUNNING, SUCCEEDED])
def test_a_step_that_is_retried_finds_its_job_and_does_not_submit_a_second_one(result: Status) -> None:
    played = Played(result, result, SUCCEEDED)
    played.follow()
    assert played.did == []
    assert_names(played.said[0], NAME, result.phase.value, "there")


def test_a_step_that_finds_a_job_that_succeeded_and_whose_output_is_gone_submits_it_again() -> None:
    played = Played(SUCCEEDED, RUNNING, SUCCEEDED)
    played.written = False
    played.follow()
    assert played.did == ["submit"]
    assert_names(played.said[0], NAME, "succeeded already", "no longer exists")


@pytest.mark.parametrize("result", [FAILED, CANCELLED])
def test_a_step_that_finds_a_job_that_ended_badly_submits_it_again(result: Status) -> None:
    played = Played(result, RUNNING, SUCCEEDED)
    played.follow()
    assert played.did == ["submit"]


@pytest.mark.parametrize("failure", [FAILED, PREEMPTED])
def test_a_job_is_submitted_again_as_long_as_its_checkpoint_moves_on(failure: Status) -> None:
    played = Played(None, failure, RUNNING, failure, RUNNING, failure, RUNNING, SUCCEEDED)
    played.checkpoints = [10, 20, 21]
    played.follow()
    assert played.did == ["submit"] * 4
    again = [line.rpartition(" ")[2] for line in played.said if "submitted again" in line]
    assert again == ["10", "20", "21"]


def test_a_job_that_fails_twice_at_the_same_checkpoint_is_not_submitted_again() -> None:
    played = Played(None, FAILED, RUNNING, FAILED, RUNNING, FAILED)
    played.checkpoints = [10, 20, 20]
    assert_names(ended(played), NAME, FAILED.reason, "update 20", "twice", "(there)")
    assert played.did == ["submit"] * 3


def test_a_job_is_submitted_again_as_often_as_asked_for_and_no_more() -> None:
    played = Played(None, *[FAILED] * 9)
    played.checkpoints = range(1, 9)
    assert_names(ended(played, max_restarts=2), NAME, "3 times", "--max-restarts 2")
    assert played.did == ["submit"] * 3


def test_before_a_first_checkpoint_only_a_job_whose_machine_was_taken_is_submitted_again_and_once() -> None:
    lost = {"update": -1, "resubmissions": 0, "max_restarts": 5}
    assert reason_not_to_resubmit(FAILED, previous_update=None, **lost)
    assert reason_not_to_resubmit(PREEMPTED, previous_update=None, **lost) == ""
    assert "twice" in reason_not_to_resubmit(PREEMPTED, previous_update=-1, **lost)


def test_what_a_rank_said_is_to_be_mended_is_the_error_and_not_tried_again() -> None:
    lines = [[("node-0", "starts")], [("node-0", "cappy finetuning: out: no such folder; check the path")]]
    played = Played(None, RUNNING, FAILED, lines=lines)
    played.checkpoints = [10]
    assert ended(played) == f"{NAME}: out: no such folder; check the path"
    assert played.did == ["submit"]


def test_a_job_that_waits_for_an_image_that_is_not_there_is_reported_and_cancelled() -> None:
    why = "node-0 cannot start, ImagePullBackOff of image x (no such image)"
    played = Played(None, PENDING, Status(Phase.PENDING, why, cannot_start=True))
    assert_names(ended(played), NAME, why, "cancelled", "same command")
    assert played.did == ["submit", "cancel"]


def test_a_job_that_someone_else_cancelled_is_reported_and_left_alone() -> None:
    for look in (None, CANCELLED):
        played = Played(None, RUNNING, look)
        assert_names(ended(played), NAME, "someone else", "same command")
        assert played.did == ["submit"]


def test_when_the_step_is_to_end_so_does_the_job_within_a_second() -> None:
    played = Played(None, PENDING, RUNNING)
    played.cancelled_at = lambda: "SIGTERM" if played.now >= 7 else ""
    assert_names(ended(played), NAME, "cancelled", "(SIGTERM)", "same command")
    assert played.did == ["submit", "cancel"]
    assert played.now <= 8


def test_a_step_that_is_to_end_before_it_submitted_anything_submits_nothing() -> None:
    played = Played(None)
    played.cancelled_at = lambda: "SIGTERM"
    ended(played)
    assert "submit" not in played.did


def test_ctrl_c_cancels_the_job_too() -> None:
    played = Played(None, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        played.follow()
    assert played.did == ["submit", "cancel"]


def test_a_job_that_takes_longer_than_allowed_is_cancelled() -> None:
    played = Played(None, RUNNING)
    assert_names(ended(played, timeout=7200.0), NAME, "2 hours", "cancelled", "--timeout-hours")
    assert played.did == ["submit", "cancel"]


def test_a_platform_that_is_silent_for_a_while_loses_nothing_and_is_reported_of_once() -> None:
    silence = UnansweredError("no answer")
    played = Played(None, RUNNING, *[silence] * 20, RUNNING, SUCCEEDED)
    played.follow()
    assert played.did == ["submit"]
    assert sum("no answer" in line for line in played.said) == 1


def test_a_platform_that_is_silent_for_long_ends_the_step_and_leaves_the_job() -> None:
    played = Played(None, RUNNING, UnansweredError("no answer"))
    assert ended(played) == "no answer"
    assert played.did == ["submit"]
    assert PATIENCE_SECONDS < played.now < 2 * PATIENCE_SECONDS


def test_a_platform_that_never_answered_is_not_waited_for() -> None:
    played = Played(UnansweredError("no cluster"))
    assert ended(played) == "no cluster"
    assert played.now == 0


def test_a_log_that_may_not_be_read_is_reported_once_and_ends_nothing() -> None:
    class Secret(Played):
        def lines(self, name: str) -> list[tuple[str, str]]:
            raise ConfigError("no permission")

    played = Secret(None, RUNNING, RUNNING, SUCCEEDED)
    played.follow()
    assert sum("no permission" in line for line in played.said) == 1


class Slow(Played):
    """A platform whose job shows these states after it was cancelled, the last for ever."""

    ends: Sequence[Look] = ()

    def cancel(self, name: str) -> None:
        super().cancel(name)
        self.looks = list(self.ends)


@pytest.mark.parametrize("end", [None, CANCELLED, FAILED])
def test_a_cancelled_job_is_waited_for_until_it_has_ended_and_what_it_says_then_is_reported(end: Look) -> None:
    played = Slow(None, RUNNING, lines=[[], [], [], [("node-0", "wrote a checkpoint")]])
    played.ends = [RUNNING] * 20 + [end]
    played.cancelled_at = lambda: "SIGTERM" if played.now >= 7 else ""
    ended(played)
    assert played.looks == [end], "whoever goes on would meet it"
    assert played.said[-1] == "node-0: wrote a checkpoint"


def test_a_cancelled_job_that_does_not_end_is_waited_for_as_long_as_a_grace_period() -> None:
    played = Slow(None, RUNNING)
    played.ends = [RUNNING]
    played.cancelled_at = lambda: "SIGTERM" if played.now >= 7 else ""
    ended(played)
    assert CANCEL_SECONDS <= played.now - 7 < 2 * CANCEL_SECONDS


def test_a_job_that_cannot_be_cancelled_is_reported_with_how_to_do_it_by_hand() -> None:
    class Stuck(Played):
        def cancel(self, name: str) -> None:
            raise ConfigError("no permission")

    played = Stuck(None, RUNNING)
    played.cancelled_at = lambda: "SIGTERM" if played.now >= 7 else ""
    assert_names(ended(played), NAME, "no permission", "by hand", "there")
