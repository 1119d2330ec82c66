"""How far a step is, for a person."""

import pytest

from cappy import progress as progress_module
from cappy.progress import ProgressLine, ProgressState, describe, duration


def state(done: int, total: int | None, *, resumed: int = 0, seconds: float = 10.0) -> ProgressState:
    return ProgressState(done=done, total=total, unit="rows", resumed=resumed, started=0.0, updated=seconds)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (state(0, 1000), "0 of 1,000 rows"),
        (state(400, 1000), "400 of 1,000 rows, 40 rows/s, 15 s left"),
        (
            state(400, 1000, resumed=390),
            "400 of 1,000 rows (390 resumed), 1 rows/s, 10 min 00 s left",
        ),
        (state(50_000, None), "50,000 rows, 5,000 rows/s"),
        (state(996, 996), "996 of 996 rows, 100 rows/s"),
        (state(3, 9, seconds=60.0), "3 of 9 rows, 0.05 rows/s, 2 min 00 s left"),
    ],
)
def test_done_total_rate_and_time_left_are_reported_where_they_are_known(given: ProgressState, text: str) -> None:
    assert describe(given) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0.4 s"), (59.6, "1 min 00 s"), (185.0, "3 min 05 s"), (7800.0, "2 h 10 min")]
)
def test_durations_read_as_a_person_says_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_without_a_terminal_lines_are_plain_and_rare(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine("cappy brewing", plain_seconds=0.0) as progress:
        progress(1, 2, unit="cups")
    assert capsys.readouterr().err.startswith("cappy brewing: 1 of 2 cups")
    with ProgressLine("cappy brewing") as progress:
        for done in range(1000):
            progress(done, 1000)
    assert capsys.readouterr().err == ""


def test_the_first_plain_line_comes_soon_and_the_next_ones_are_rare(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_module, "FIRST_PLAIN_SECONDS", 0.0)
    with ProgressLine("cappy brewing") as progress:
        for done in range(1000):
            progress(done, 1000, note="last error: 429 slow down")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cappy brewing: 0 of 1,000 rows")
    assert line.endswith("last error: 429 slow down")
