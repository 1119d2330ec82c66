"""One child process as its parent sees it: lines in, lines out, and how it ended.

The child gets none of the parent's environment but the time zone, and no file but its two pipes. It ends when its
standard input is closed, and so with its parent.
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

_START = "import sys; kind, *sys.path[:0] = sys.argv[1:]; from cappy.rendering.child import main; main(kind)"
_START_SECONDS = 120.0
_CHUNK = 2**16
_HELD = 2**13
"""Bytes that wait for more before they are written."""

_processes: "weakref.WeakSet[Process]" = weakref.WeakSet()


class ChildExitError(Exception):
    """The child ended, or was ended: `limit` is time, memory or size, or else says how."""

    def __init__(self, limit: str) -> None:
        super().__init__(limit)
        self.limit = limit


class Process:
    """A running child for templates of a kind. One thread at a time may use it, in the process that started it."""

    def __init__(self, kind: str) -> None:
        paths = [str(Path(cappy.__file__).parents[1]), *filter(None, sys.path)]
        self.kind = kind
        self.numbers: dict[Hashable, int] = {}
        self.load_outcomes: dict[Hashable, object] = {}
        self.num_answers = 0
        self._owner = os.getpid()
        self._unsent = bytearray()
        self._received = bytearray()
        self._popen = subprocess.Popen(  # noqa: S603 # our own interpreter, and no text of a template
            [sys.executable, "-I", "-S", "-X", "utf8", "-c", _START, kind, *paths],
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
            raise RuntimeError(f"the process that renders {kind} templates does not start ({error.limit})") from error
        self.num_answers = 0

    @property
    def is_ours(self) -> bool:
        """Whether it is open, and this process started it: a fork of that one may not use it."""
        return self._owner == os.getpid()

    @property
    def pid(self) -> int:
        """The number of the child."""
        return self._popen.pid

    def send(self, line: bytes) -> None:
        """Queues one line. Where the child is gone, `receive` says so."""
        self._unsent += line
        self._unsent += b"\n"
        if len(self._unsent) >= _HELD and self.is_ours:
            self._write()

    def receive(self, seconds: float) -> bytes:
        """The next line of the child, without its end; it may take so many seconds. EndedError where none comes."""
        if not self.is_ours:
            raise ChildExitError("is closed, or another process's")
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
        """Ends the child, at once; in a fork of the parent it is left alone."""
        if self._owner == os.getpid():
            self._popen.kill()
            self._popen.wait()
        elif self._owner:
            self._popen.returncode = 0  # or it would be waited for, by one who is not its parent
        self._owner = 0
        _processes.discard(self)
        for pipe in self._pipes:
            pipe.close()

    def _write(self) -> None:
        try:
            sent = os.write(self._input, self._unsent)
        except BlockingIOError:
            return
        except OSError:  # it is gone; what it still had to say is read first
            self._unsent.clear()
            return
        del self._unsent[:sent]

    def _wait(self, deadline: float) -> None:
        """Writes what waits and reads what is there; blocks until one of them gets on."""
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
            raise self._end_error()
        self._received += chunk

    def _end_error(self) -> ChildExitError:
        """How the child ended; it is known to have closed a pipe."""
        try:
            code = self._popen.wait(timeout=1)
        except subprocess.TimeoutExpired:
            code = 0
        self.close()
        if code == OUT_OF_MEMORY:
            return ChildExitError("memory")
        if code == -signal.SIGXCPU:
            return ChildExitError("time")
        return ChildExitError(f"ends its process with {signal.Signals(-code).name if code < 0 else code}")


def close_all() -> None:
    """Ends all children; in a fork closes its copies of the pipes of its parent's children."""
    for process in list(_processes):
        process.close()
