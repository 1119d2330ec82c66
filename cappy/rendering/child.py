"""What runs in the child: templates are compiled once, then rendered for each job that comes.

One line of JSON is one message. In: `["load", number, seconds, source...]` and `["run", seconds, values, [[number,
argument], ...]]`. Out, in the same order: what a load gives, and the list of what each template of a run gives.
Instead of a value an answer may hold {"error": reason} or {"limit": what}: time, size, or unloaded (it did not
compile). Where memory runs out, the process ends with `OUT_OF_MEMORY`.
"""

import gc
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jinja2.debug  # needed when a template fails, and no file may be opened then  # noqa: F401

from cappy.errors import shown
from cappy.rendering.limits import MAX_ANSWER, OUT_OF_MEMORY, TimeIsUpError, apply_limits, start_time, stop_time
from cappy.rendering.values import decode

_CHUNK = 2**16
_from_json = json.JSONDecoder(object_hook=decode).decode
_to_json = json.JSONEncoder(ensure_ascii=False).encode


class Kind(Protocol):
    """A module of templates of one kind."""

    def load(self, *source: str) -> tuple[Any, Any]:
        """A compiled template, and what to answer once it is compiled."""

    def render(self, compiled: Any, values: Any, argument: Any) -> Any:
        """What a template makes of the values of a job."""

    def prepare(self, values: dict[str, Any]) -> Any:
        """The values of a job, as all its templates take them."""


def main(kind: str) -> None:
    """Answers what comes on standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    module: Any = importlib.import_module(f"cappy.rendering.{kind}")
    source, target = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    sys.dont_write_bytecode = True
    gc.collect()
    gc.freeze()
    apply_limits()
    os.dup2(nothing, 2)  # only now: why a child does not start is worth reading
    os.close(nothing)
    write_line(target, "ready")
    try:
        serve(module, read_lines(source), lambda answer: write_line(target, answer))
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


def serve(kind: Kind, lines: Iterator[bytes], answer: Callable[[Any], None]) -> None:
    """Answers each message in its order."""
    loaded: dict[int, Any] = {}
    for line in lines:
        op, *parts = _from_json(line.decode("utf-8", "surrogatepass"))
        if op == "load":
            answer(_load(kind, loaded, *parts))
        else:
            answer(_run(kind, loaded, *parts))


def _load(kind: Kind, loaded: dict[int, Any], number: int, seconds: float, *source: str) -> Any:
    def compiled() -> Any:
        loaded[number], answer = kind.load(*source)
        return answer

    return _call_within(seconds, compiled)


def _run(kind: Kind, loaded: dict[int, Any], seconds: float, values: dict[str, Any], items: list[Any]) -> list[Any]:
    prepared = kind.prepare(values)
    answers = []
    for number, argument in items:
        if number in loaded:
            answers.append(_call_within(seconds, kind.render, loaded[number], prepared, argument))
        else:
            answers.append({"limit": "unloaded"})
    return answers


def _call_within(seconds: float, call: Callable[..., Any], *args: Any) -> Any:
    """What the call gives, or how it failed."""
    try:
        try:
            start_time(seconds)
            return call(*args)
        except Exception as error:  # foreign code: whatever it raises is its own failure
            if isinstance(error, MemoryError):
                raise
            return {"error": _reason(error)}
        finally:
            stop_time()
    except TimeIsUpError:
        stop_time()  # again: the time may have been up just before it was stopped
        return {"limit": "time"}


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {shown(' '.join(str(error).split()), limit=120)}"


def read_lines(source: int) -> Iterator[bytes]:
    """The lines that come, until the other end is closed."""
    parts: list[bytes] = []
    while chunk := os.read(source, _CHUNK):
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            parts.append(end)
            yield b"".join(parts)
            parts.clear()
        parts.append(rest)


def write_line(target: int, answer: Any) -> None:
    """Writes one answer, or that it is too large."""
    line = _line(answer)
    if len(line) > MAX_ANSWER:
        line = _line([{"limit": "size"}] * len(answer) if isinstance(answer, list) else {"limit": "size"})
    rest = memoryview(line)
    while rest:
        rest = rest[os.write(target, rest) :]


def _line(answer: Any) -> bytes:
    return _to_json(answer).encode("utf-8", "surrogatepass") + b"\n"
