"""What runs in the child: templates are compiled once, then rendered for each job that comes, within limits.

One line of JSON is one message. In: `["load", number, seconds, source...]` and `["run", seconds, values, [[number,
argument], ...]]`. Out, in the same order: what a load gives, and the list of what each template of a run gives.
Instead of a value an answer may hold {"error": reason} or {"limit": what}: time, size, or unloaded (it did not
compile). Where memory runs out, the process ends with `OUT_OF_MEMORY`.

CPU time is limited in two steps. After its seconds a timer raises `_TimeLimitError` in the child's own Python, and the
child goes on with the next template. A single call into C (a sort, a power) is not interrupted by that: the kernel ends
the process a little later. Memory is limited by the kernel too, in address space above what the child holds when it
starts.

Values of a row travel as JSON. What JSON lacks is tagged, so that a template sees what it would see in place: a tagged
value is an object with the empty key alone, {"": [tag, ...]}.
"""

import datetime
import decimal
import gc
import json
import math
import os
import resource
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar

import jinja2.debug  # needed when a template fails, and no file may be opened then  # noqa: F401

from cappy.errors import quote
from cappy.rendering import MAX_ANSWER, MAX_MEMORY, OUT_OF_MEMORY

_CHUNK = 2**16
_to_json = json.JSONEncoder(ensure_ascii=False).encode
_GRACE = 1
"""Seconds of CPU time between the timer and the kernel's limit, at least."""
_AGAIN = 0.05
"""The timer fires again after so many seconds, in case something swallowed the exception."""
_MAX_FILES = 16

_state = {"running": False, "soft": 0}


Compiled = TypeVar("Compiled")
Prepared = TypeVar("Prepared")


class _Kind(Protocol[Compiled, Prepared]):
    """Templates of one kind: a module, or an object."""

    def load(self, *source: str) -> tuple[Compiled, object]:
        """A compiled template, and what to answer once it is compiled."""

    def render(self, compiled: Compiled, values: Prepared, argument: str | None, /) -> object:
        """What a template makes of the values of a job."""

    def prepare(self, values: dict[str, object], /) -> Prepared:
        """The values of a job, as all its templates take them."""


def main(kind: str) -> None:
    """Answers what comes on standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    serve = _make_server(kind)
    source, target = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    sys.dont_write_bytecode = True
    gc.collect()
    gc.freeze()
    _apply_limits()
    os.dup2(nothing, 2)  # only now: why a child does not start is worth reading
    os.close(nothing)
    _write_line(target, "ready")
    try:
        serve(_read_lines(source), lambda answer: _write_line(target, answer))
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


class _ChatTemplates:
    """An LLM's chat templates: transformers renders them, the installed version, as `apply_chat_template` has it do.

    Importing that takes half a second, once, and no torch.
    """

    def __init__(self) -> None:
        from transformers.utils.chat_template_utils import render_jinja_template

        self._render = render_jinja_template

    def load(self, *source: str) -> tuple[str, None]:
        """The template as it is: transformers compiles it when it is first rendered, and keeps it."""
        return source[0], None

    def prepare(self, values: dict[str, object]) -> dict[str, Any]:
        """The messages and the special tokens by name."""
        return values

    def render(self, compiled: str, values: dict[str, Any], argument: str | None) -> str:
        """The prompt, up to where the model begins to speak."""
        rendered, _indices = self._render(
            conversations=[values["messages"]], chat_template=compiled, add_generation_prompt=True, **values["tokens"]
        )
        return str(rendered[0])


def _make_server(kind: str) -> Callable[[Iterator[bytes], Callable[[object], None]], None]:
    """Serves templates of a kind. What they need is imported here, since no file may be opened later."""
    if kind == "chat":
        return partial(_serve, _ChatTemplates())
    if kind != "promptsource":
        raise ValueError(f"no templates of the kind {kind}")
    from cappy.rendering import promptsource

    return partial(_serve, promptsource)


def _serve(kind: _Kind[Compiled, Prepared], lines: Iterator[bytes], answer: Callable[[object], None]) -> None:
    """Answers each message in its order."""
    loaded: dict[int, Compiled] = {}
    for line in lines:
        op, *parts = _from_json(line.decode("utf-8", "surrogatepass"))
        if op == "load":
            answer(_load(kind, loaded, *parts))
        else:
            answer(_run(kind, loaded, *parts))


def _load(
    kind: _Kind[Compiled, Prepared], loaded: dict[int, Compiled], number: int, seconds: float, *source: str
) -> object:
    def compile_template() -> object:
        loaded[number], answer = kind.load(*source)
        return answer

    return _call_within(seconds, compile_template)


def _run(
    kind: _Kind[Compiled, Prepared],
    loaded: dict[int, Compiled],
    seconds: float,
    values: dict[str, object],
    items: list[tuple[int, str | None]],
) -> list[object]:
    prepared = kind.prepare(values)
    answers: list[object] = []
    for number, argument in items:
        if number in loaded:
            answers.append(_call_within(seconds, kind.render, loaded[number], prepared, argument))
        else:
            answers.append({"limit": "unloaded"})
    return answers


def _call_within(seconds: float, call: Callable[..., object], *args: object) -> object:
    """What the call gives, or how it failed."""
    try:
        try:
            _start_timer(seconds)
            return call(*args)
        except Exception as error:  # foreign code: whatever it raises is its own failure
            if isinstance(error, MemoryError):
                raise
            return {"error": _reason(error)}
        finally:
            _stop_timer()
    except _TimeLimitError:
        _stop_timer()  # again: the time may have been up just before it was stopped
        return {"limit": "time"}


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {quote(' '.join(str(error).split()), limit=120)}"


def _read_lines(source: int) -> Iterator[bytes]:
    """The lines that come, until the other end is closed."""
    parts: list[bytes] = []
    while chunk := os.read(source, _CHUNK):
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            parts.append(end)
            yield b"".join(parts)
            parts.clear()
        parts.append(rest)


def _write_line(target: int, answer: object) -> None:
    """Writes one answer, or that it is too large."""
    line = _encode_line(answer)
    if len(line) > MAX_ANSWER:
        line = _encode_line([{"limit": "size"}] * len(answer) if isinstance(answer, list) else {"limit": "size"})
    rest = memoryview(line)
    while rest:
        rest = rest[os.write(target, rest) :]


def _encode_line(answer: object) -> bytes:
    return _to_json(answer).encode("utf-8", "surrogatepass") + b"\n"


class _TimeLimitError(BaseException):
    """Not an Exception: no `except Exception` between here and the caller may catch it."""


def _apply_limits() -> None:
    """Sets the limits of this process for good; CPU time is limited by `_start_timer`."""
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_NOFILE, _MAX_FILES)
    _limit(resource.RLIMIT_NPROC, 0)
    size = _address_space()
    if size:  # macOS has no such file, and does not enforce this limit
        _limit(resource.RLIMIT_AS, size + MAX_MEMORY)
    signal.signal(signal.SIGPROF, _on_timer)


def _limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def _address_space() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _start_timer(seconds: float) -> None:
    """From now on until `_stop_timer` the code may take so many seconds of CPU time, or _TimeIsUpError is raised."""
    signal.setitimer(signal.ITIMER_PROF, seconds, _AGAIN)
    soft = math.ceil(time.process_time() + seconds) + _GRACE
    if soft != _state["soft"]:
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
        _state["soft"] = soft
    _state["running"] = True


def _stop_timer() -> None:
    """Nothing is raised any more. The kernel's limit stays."""
    _state["running"] = False


def _on_timer(number: int, frame: FrameType | None) -> None:
    if _state["running"]:
        raise _TimeLimitError


_PLAIN = frozenset((str, bool, float, type(None)))
_MAX_BITS = 2**12
"""Whole numbers of more bits travel in base 16: Python reads and writes no long ones in base 10."""
_MOMENTS = (datetime.datetime, datetime.date, datetime.time)
_SETS = (set, frozenset)


class Placeholder:
    """Stands for an object that has no copy in the child (an image, an array): it prints as that object does.

    `base` is a plain value whose attributes it has, such as the datetime that a pandas timestamp is.
    """

    def __init__(self, name: str, text: str, representation: str, base: object) -> None:
        self.__name__ = name
        self._text, self._representation, self._base = text, representation, base

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return self._representation

    def __getattr__(self, name: str) -> object:
        if name.startswith("_"):
            raise AttributeError(name)
        value: object = getattr(self._base, name)
        return value


def encode(value: object) -> object:
    """The value as `json.dumps` takes it; RecursionError where it is nested too deep."""
    if type(value) in _PLAIN:
        return value
    if type(value) is list:
        return [encode(inner) for inner in value]
    if type(value) is int:
        return value if value.bit_length() <= _MAX_BITS else {"": ["int", hex(value)]}
    if isinstance(value, Mapping):
        if all(type(name) is str and name for name in value):
            return {name: encode(inner) for name, inner in value.items()}
        return {"": ["dict", [[encode(name), encode(inner)] for name, inner in value.items()]]}
    return {"": _tag(value)}


def _tag(value: object) -> list[object]:
    kind = type(value)
    if type(value) is tuple:
        return ["tuple", *map(encode, value)]
    if isinstance(value, _SETS) and kind in _SETS:
        return [kind.__name__, *map(encode, sorted(value, key=repr))]
    if type(value) is bytes:
        return ["bytes", value.hex()]
    if isinstance(value, _MOMENTS) and kind in _MOMENTS and getattr(value, "tzinfo", None) is None:
        return [kind.__name__, value.isoformat(), getattr(value, "fold", 0)]
    if type(value) is datetime.timedelta:
        return ["timedelta", value.days, value.seconds, value.microseconds]
    if kind in (decimal.Decimal, uuid.UUID):
        return [kind.__name__, str(value)]
    return ["object", getattr(value, "__name__", kind.__name__), str(value), repr(value), encode(_base(value))]


def _base(value: object) -> object:
    """A plain value with the attributes that a template may ask for, where there is one."""
    if isinstance(value, datetime.datetime):
        moment = value.replace(tzinfo=None)
        return datetime.datetime.combine(datetime.date(moment.year, moment.month, moment.day), moment.time())
    if isinstance(value, datetime.timedelta):
        return datetime.timedelta(value.days, value.seconds, value.microseconds)
    return None


def decode(values: dict[str, Any]) -> object:
    """The value of a JSON object: as `object_hook` of `json.loads` it makes back what `encode` was given."""
    if "" not in values:
        return values
    tag, *parts = values[""]
    return _MAKERS[tag](*parts)


_from_json = json.JSONDecoder(object_hook=decode).decode


def _make_dict(items: Iterable[tuple[object, object]]) -> dict[object, object]:
    return {name: inner for name, inner in items}  # noqa: C416 # dict() would take texts of two characters for pairs


_MAKERS: Mapping[str, Callable[..., object]] = {
    "int": lambda digits: int(digits, 16),
    "dict": _make_dict,
    "tuple": lambda *items: items,
    "set": lambda *items: set(items),
    "frozenset": lambda *items: frozenset(items),
    "bytes": bytes.fromhex,
    "datetime": lambda text, fold: datetime.datetime.fromisoformat(text).replace(fold=fold),
    "date": lambda text, _: datetime.date.fromisoformat(text),
    "time": lambda text, fold: datetime.time.fromisoformat(text).replace(fold=fold),
    "timedelta": datetime.timedelta,
    "Decimal": decimal.Decimal,
    "UUID": uuid.UUID,
    "object": Placeholder,
}
