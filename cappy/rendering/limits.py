"""What the child may use: memory, files, and CPU time for each template, in two steps.

After its seconds a timer raises `TimeIsUpError` in the child's own Python, and the child goes on with the next
template. A single call into C (a sort, a power) is not interrupted by that: the kernel ends the process a little later.
Memory is limited by the kernel too, in address space above what the child holds when it starts.
"""

import math
import os
import resource
import signal
import time
from pathlib import Path
from types import FrameType

MAX_MEMORY = 2**29
"""Bytes above what the child has when it is ready."""
MAX_ANSWER = 2**23
"""Bytes of one answer."""
OUT_OF_MEMORY = 3
"""How a child exits whose memory runs out."""
_GRACE = 1
"""Seconds of CPU time between the timer and the kernel's limit, at least."""
_AGAIN = 0.05
"""The timer fires again after so many seconds, in case something swallowed the exception."""
_MAX_FILES = 16

_state = {"running": False, "soft": 0}


class TimeIsUpError(BaseException):
    """Not an Exception: no `except Exception` between here and the caller may catch it."""


def apply_limits() -> None:
    """Sets the limits of this process for good; CPU time is limited by `limited_time`."""
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_NOFILE, _MAX_FILES)
    _limit(resource.RLIMIT_NPROC, 0)
    size = _address_space()
    if size:  # macOS has no such file, and does not enforce this limit
        _limit(resource.RLIMIT_AS, size + MAX_MEMORY)
    signal.signal(signal.SIGPROF, _time_is_up)


def _limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def _address_space() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def start_time(seconds: float) -> None:
    """From now on until `stop_time` the code may take so many seconds of CPU time, or TimeIsUpError is raised."""
    signal.setitimer(signal.ITIMER_PROF, seconds, _AGAIN)
    soft = math.ceil(time.process_time() + seconds) + _GRACE
    if soft != _state["soft"]:
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
        _state["soft"] = soft
    _state["running"] = True


def stop_time() -> None:
    """Nothing is raised any more. The kernel's limit stays."""
    _state["running"] = False


def _time_is_up(number: int, frame: FrameType | None) -> None:
    if _state["running"]:
        raise TimeIsUpError
