"""The parent's side of a child process: sends lines, receives lines, and reports how the child exited.

The child inherits only the time zone from the environment, and no files but its two pipes. It exits when its standard
input is closed, so it ends with its parent.
"""

import os
import select
import signal
import subprocess
import sys
import weakref
from collections.abc import Hashable
from pathlib import Path
from time import monotonic

import cappy
from cappy.rendering import MAX_ANSWER, OUT_OF_MEMORY

_CHILD_CODE = "import sys; kind, *sys.path[:0] = sys.argv[1:]; from cappy.rendering.child import main; main(kind)"
_START_SECONDS = 120.0
_CHUNK = 2**16
_WRITE_THRESHOLD = 2**13
"""Bytes that are buffered before they are written."""

_processes: "weakref.WeakSet[Process]" = weakref.WeakSet()


class ChildExitError(Exception):
    """The child exited or was killed; `reason` is "time", "memory" or "size", or a text that says how it ended."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Process:
    """A child process for templates of one kind; to be used by one thread at a time, in the process that started it."""

    def __init__(self, kind: str) -> None:
        paths = [str(Path(cappy.__file__).parents[1]), *filter(None, sys.path)]
        self.kind = kind
        # By template: its number in the child, and the outcome of loading it.
        self.template_numbers: dict[Hashable, int] = {}
        self.load_outcomes: dict[Hashable, object] = {}
        self.num_answers = 0
        self._owner_pid = os.getpid()
        self._unsent = bytearray()
        self._received = bytearray()
        self._popen = subprocess.Popen(  # noqa: S603 # our own interpreter; arguments contain no template text
            [sys.executable, "-I", "-S", "-X", "utf8", "-c", _CHILD_CODE, kind, *paths],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={name: os.environ[name] for name in ("TZ",) if name in os.environ},
        )
        _processes.add(self)
        self._pipes = [pipe for pipe in (self._popen.stdin, self._popen.stdout) if pipe is not None]
        self._input, self._output = [pipe.fileno() for pipe in self._pipes]
        os.set_blocking(self._input, False)
        os.set_blocking(self._output, False)
        try:
            self.receive(_START_SECONDS)
        except ChildExitError as error:
            raise RuntimeError(f"cannot start the process that renders {kind} templates ({error.reason})") from error
        self.num_answers = 0

    @property
    def is_usable(self) -> bool:
        """Whether it is open and was started by this process; a fork must not use it."""
        return self._owner_pid == os.getpid()

    @property
    def pid(self) -> int:
        """The process id of the child."""
        return self._popen.pid

    def send(self, line: bytes) -> None:
        """Queues one line; if the child has exited, `receive` raises the error."""
        self._unsent += line
        self._unsent += b"\n"
        if len(self._unsent) >= _WRITE_THRESHOLD and self.is_usable:
            self._write()

    def receive(self, seconds: float) -> bytes:
        """The next line from the child, without the newline.

        Raises ChildExitError if there is none within `seconds`.
        """
        if not self.is_usable:
            raise ChildExitError("is closed, or belongs to another process")
        deadline = monotonic() + seconds
        start = 0
        while (end := self._received.find(b"\n", start)) < 0:
            start = len(self._received)
            if start > MAX_ANSWER:
                self.close()
                raise ChildExitError("size")
            self._wait(deadline)
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        self.num_answers += 1
        return line

    def close(self) -> None:
        """Kills the child; in a fork of the parent only closes the pipes."""
        if self._owner_pid == os.getpid():
            self._popen.kill()
            self._popen.wait()
        elif self._owner_pid:
            self._popen.returncode = 0  # otherwise Popen would wait for it, but only its parent can
        self._owner_pid = 0
        _processes.discard(self)
        for pipe in self._pipes:
            pipe.close()

    def _write(self) -> None:
        try:
            count = os.write(self._input, self._unsent)
        except BlockingIOError:
            return
        except OSError:  # the child has exited; its remaining output is read first
            self._unsent.clear()
            return
        del self._unsent[:count]

    def _wait(self, deadline: float) -> None:
        """Writes queued lines and reads output; blocks until either is possible."""
        if self._unsent:
            self._write()
        poll = select.poll()
        poll.register(self._output, select.POLLIN)
        if self._unsent:
            poll.register(self._input, select.POLLOUT)
        ready = dict(poll.poll(max(0.0, deadline - monotonic()) * 1000))
        if not ready:
            self.close()
            raise ChildExitError("time")
        if self._output in ready:
            self._read()

    def _read(self) -> None:
        try:
            chunk = os.read(self._output, _CHUNK)
        except BlockingIOError:
            return
        if not chunk:
            raise self._exit_error()
        self._received += chunk

    def _exit_error(self) -> ChildExitError:
        """The error that says how the child exited; its pipe is closed already."""
        try:
            code = self._popen.wait(timeout=1)
        except subprocess.TimeoutExpired:
            code = 0
        self.close()
        if code == OUT_OF_MEMORY:
            return ChildExitError("memory")
        if code == -signal.SIGXCPU:
            return ChildExitError("time")
        if code < 0:
            return ChildExitError(f"exited ({signal.Signals(-code).name})")
        return ChildExitError(f"exited with code {code}")


def close_all() -> None:
    """Ends all children; in a fork, closes the pipes of the parent's children."""
    for process in list(_processes):
        process.close()
