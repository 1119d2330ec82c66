"""Waiting in tests: until something holds, for a bounded time, with an error that says what did not happen."""

import subprocess
import time
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


def wait_until(
    condition: Callable[[], Result],
    what: str,
    *,
    seconds: float = 60.0,
    pause: float = 0.02,
    process: "subprocess.Popen[Any] | None" = None,
    details: Callable[[], object] | None = None,
) -> Result:
    """Asks the condition every `pause` seconds and returns its first true result.

    AssertionError that names `what` where nothing was true within `seconds`, and as soon as `process` has ended
    without it. `details` adds, for example, what a server logged.
    """
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        ended = process is not None and process.poll() is not None
        if ended or time.monotonic() >= deadline:
            problem = f"waited {seconds:g} s for {what}"
            if process is not None and ended:
                said = [text for text in process.communicate() if text]
                problem = f"waited for {what}, and the process ended with {process.returncode} {said or ''}"
            raise AssertionError(f"{problem}: {details()}" if details is not None else problem)
        time.sleep(pause)
    return result
