"""What waits in tests says what it waited for."""

import subprocess
import sys

from waiting import wait_until
from wording import raises_naming


def test_the_first_true_result_is_returned() -> None:
    results = iter([None, "", "here"])
    assert wait_until(lambda: next(results), "a text", pause=0.0) == "here"


def test_a_wait_that_runs_out_says_what_for_how_long_and_what_is_known() -> None:
    with raises_naming(AssertionError, "0.1 s", "the moon", "it is day"):
        wait_until(lambda: False, "the moon", seconds=0.1, details=lambda: "it is day")


def test_a_wait_ends_with_the_process_that_it_waits_for() -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no port is free')"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with raises_naming(AssertionError, "the server", "ended with 1", "no port is free"):
        wait_until(lambda: False, "the server", seconds=60, process=process)
