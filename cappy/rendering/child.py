"""The code of the child process: compiles templates once and renders them for each job, within limits.

Each message is a line of JSON. Input: `["load", number, seconds, source...]` and `["run", seconds, values, [[number,
argument], ...]]`. Output, in the same order: the result of a load, and the list of results of a run. Instead of a value
a result may be {"error": reason} or {"limit": name}, where the name is time, size or unloaded (the template did not
compile). If memory runs out, the process exits with `OUT_OF_MEMORY`.

CPU time is limited in two steps. A timer raises `_TimeLimitError` in Python, and the child continues with the next
template. That does not interrupt a single call into C (a sort, a power), so the kernel kills the process a little
later. The kernel also limits memory, as address space on top of what the child uses at start.

Values of a row are sent as JSON. Types that JSON lacks are tagged, so that a template gets the original types: a tagged
value is an object with only the empty key, {"": [tag, ...]}.
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

import jinja2.debug  # Jinja imports it when a template fails, but then no file can be opened  # noqa: F401

from cappy.errors import quote
from cappy.rendering import MAX_ANSWER, MAX_MEMORY, OUT_OF_MEMORY

_CHUNK = 2**16
_to_json = json.JSONEncoder(ensure_ascii=False).encode
_GRACE_SECONDS = 1
"""Minimum CPU time between the timer and the kernel's limit."""
_REPEAT_SECONDS = 0.05
"""The timer fires again after this time, in case other code caught the exception."""
_MAX_FILES = 16

_state = {"running": False, "cpu_limit": 0}


Compiled = TypeVar("Compiled")
Prepared = TypeVar("Prepared")


class _Kind(Protocol[Compiled, Prepared]):
    """The operations on templates of one kind, implemented by a module or an object."""

    def load(self, *source: str) -> tuple[Compiled, object]:
        """Compiles a template; also returns the answer to send."""

    def render(self, compiled: Compiled, values: Prepared, argument: str | None, /) -> object:
        """Renders a template with the values of a job."""

    def prepare(self, values: dict[str, object], /) -> Prepared:
        """Prepares the values of a job for all its templates."""


def main(kind: str) -> None:
    """Answers the messages on standard input until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the child
    serve = _make_server(kind)
    read_fd, write_fd = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    sys.dont_write_bytecode = True
    gc.collect()
    gc.freeze()
    _apply_limits()
    os.dup2(null, 2)  # only now, so that errors at start are visible
    os.close(null)
    _write_line(write_fd, "ready")
    try:
        serve(_read_lines(read_fd), lambda answer: _write_line(write_fd, answer))
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


class _ChatTemplates:
    """Chat templates of LLMs, rendered by the function of transformers that `apply_chat_template` uses.

    Importing it takes half a second, once, and does not import torch.
    """

    def __init__(self) -> None:
        from transformers.utils.chat_template_utils import render_jinja_template

        self._render = render_jinja_template

    def load(self, *source: str) -> tuple[str, None]:
        """Returns the template's text: transformers compiles it on first use, and caches it."""
        return source[0], None

    def prepare(self, values: dict[str, object]) -> dict[str, Any]:
        """Returns the values as they are: the messages, and the special tokens by name."""
        return values

    def render(self, compiled: str, values: dict[str, Any], argument: str | None) -> str:
        """Renders the prompt, up to the start of the model's response."""
        rendered, _indices = self._render(
            conversations=[values["messages"]], chat_template=compiled, add_generation_prompt=True, **values["tokens"]
        )
        return str(rendered[0])


def _make_server(kind: str) -> Callable[[Iterator[bytes], Callable[[object], None]], None]:
    """The serve function of a kind; imports what it needs now, because no file can be opened later."""
    if kind == "chat":
        return partial(_serve, _ChatTemplates())
    if kind != "promptsource":
        raise ValueError(f"unknown kind of templates {kind!r}; choose chat or promptsource")
    from cappy.rendering import promptsource

    return partial(_serve, promptsource)


def _serve(kind: _Kind[Compiled, Prepared], lines: Iterator[bytes], answer: Callable[[object], None]) -> None:
    """Answers the messages in order."""
    loaded: dict[int, Compiled] = {}
    for line in lines:
        message_kind, *parts = _from_json(line.decode("utf-8", "surrogatepass"))
        if message_kind == "load":
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
    """The result of the call, or an object with its error or exceeded limit."""
    try:
        try:
            _start_timer(seconds)
            return call(*args)
        except Exception as error:  # a template may raise anything
            if isinstance(error, MemoryError):
                raise
            return {"error": _error_text(error)}
        finally:
            _stop_timer()
    except _TimeLimitError:
        _stop_timer()  # again, because the timer may have fired just before it was stopped
        return {"limit": "time"}


def _error_text(error: Exception) -> str:
    return f"{type(error).__name__}: {quote(' '.join(str(error).split()), limit=120)}"


def _read_lines(fd: int) -> Iterator[bytes]:
    """Yields lines until the other end is closed."""
    parts: list[bytes] = []
    while chunk := os.read(fd, _CHUNK):
        *lines, tail = chunk.split(b"\n")
        for line in lines:
            parts.append(line)
            yield b"".join(parts)
            parts.clear()
        parts.append(tail)


def _write_line(fd: int, answer: object) -> None:
    """Writes one answer, or the size limit if it is too large."""
    line = _encode_line(answer)
    if len(line) > MAX_ANSWER:
        line = _encode_line([{"limit": "size"}] * len(answer) if isinstance(answer, list) else {"limit": "size"})
    remaining = memoryview(line)
    while remaining:
        remaining = remaining[os.write(fd, remaining) :]


def _encode_line(answer: object) -> bytes:
    return _to_json(answer).encode("utf-8", "surrogatepass") + b"\n"


class _TimeLimitError(BaseException):
    """The time limit is exceeded. Not an Exception, so that no `except Exception` in other code catches it."""


def _apply_limits() -> None:
    """Sets the limits of this process permanently; `_start_timer` limits CPU time."""
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_NOFILE, _MAX_FILES)
    _limit(resource.RLIMIT_NPROC, 0)
    size = _address_space()
    if size:  # macOS has no such file and does not enforce this limit
        _limit(resource.RLIMIT_AS, size + MAX_MEMORY)
    signal.signal(signal.SIGPROF, _on_timer)


def _limit(resource_kind: int, limit: int) -> None:
    hard = resource.getrlimit(resource_kind)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource_kind, (limit, limit))


def _address_space() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _start_timer(seconds: float) -> None:
    """Starts the limit on CPU time, after which _TimeLimitError is raised, until `_stop_timer`."""
    signal.setitimer(signal.ITIMER_PROF, seconds, _REPEAT_SECONDS)
    cpu_limit = math.ceil(time.process_time() + seconds) + _GRACE_SECONDS
    if cpu_limit != _state["cpu_limit"]:
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(
            resource.RLIMIT_CPU, (cpu_limit if hard == resource.RLIM_INFINITY else min(cpu_limit, hard), hard)
        )
        _state["cpu_limit"] = cpu_limit
    _state["running"] = True


def _stop_timer() -> None:
    """Stops raising errors; the kernel's limit stays."""
    _state["running"] = False


def _on_timer(signal_number: int, frame: FrameType | None) -> None:
    if _state["running"]:
        raise _TimeLimitError


_JSON_TYPES = frozenset((str, bool, float, type(None)))
_MAX_BITS = 2**12
"""Larger integers are sent in base 16, because Python limits the length of decimal integers."""
_DATETIME_TYPES = (datetime.datetime, datetime.date, datetime.time)
_SET_TYPES = (set, frozenset)


class Placeholder:
    """Replaces an object that cannot be sent to the child (an image, an array), with the same printed form.

    It has the attributes of `base`, a plain value such as a datetime for a pandas timestamp.
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
    """Converts a value for `json.dumps`; raises RecursionError if it is nested too deeply."""
    if type(value) in _JSON_TYPES:
        return value
    if type(value) is list:
        return [encode(inner) for inner in value]
    if type(value) is int:
        return value if value.bit_length() <= _MAX_BITS else {"": ["int", hex(value)]}
    if isinstance(value, Mapping):
        if all(type(name) is str and name for name in value):
            return {name: encode(inner) for name, inner in value.items()}
        return {"": ["dict", [[encode(name), encode(inner)] for name, inner in value.items()]]}
    return {"": _tagged(value)}


def _tagged(value: object) -> list[object]:
    kind = type(value)
    if type(value) is tuple:
        return ["tuple", *map(encode, value)]
    if isinstance(value, _SET_TYPES) and kind in _SET_TYPES:
        return [kind.__name__, *map(encode, sorted(value, key=repr))]
    if type(value) is bytes:
        return ["bytes", value.hex()]
    if isinstance(value, _DATETIME_TYPES) and kind in _DATETIME_TYPES and getattr(value, "tzinfo", None) is None:
        return [kind.__name__, value.isoformat(), getattr(value, "fold", 0)]
    if type(value) is datetime.timedelta:
        return ["timedelta", value.days, value.seconds, value.microseconds]
    if kind in (decimal.Decimal, uuid.UUID):
        return [kind.__name__, str(value)]
    return ["object", getattr(value, "__name__", kind.__name__), str(value), repr(value), encode(_plain_base(value))]


def _plain_base(value: object) -> object:
    """A plain value with the attributes that a template may use, or None."""
    if isinstance(value, datetime.datetime):
        plain = value.replace(tzinfo=None)
        return datetime.datetime.combine(datetime.date(plain.year, plain.month, plain.day), plain.time())
    if isinstance(value, datetime.timedelta):
        return datetime.timedelta(value.days, value.seconds, value.microseconds)
    return None


def decode(values: dict[str, Any]) -> object:
    """The inverse of `encode` for a JSON object, for use as `object_hook` of `json.loads`."""
    if "" not in values:
        return values
    tag, *parts = values[""]
    return _DECODERS[tag](*parts)


_from_json = json.JSONDecoder(object_hook=decode).decode


def _make_dict(items: Iterable[tuple[object, object]]) -> dict[object, object]:
    return {name: inner for name, inner in items}  # noqa: C416 # dict() would accept texts of two characters as pairs


_DECODERS: Mapping[str, Callable[..., object]] = {
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
