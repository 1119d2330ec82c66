"""A server that answers any bytes at all, and completions that no honest server would send."""

import copy
import json
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler
from typing import Any

from hypothesis import strategies as st
from local_server import handled_by

Parts = Sequence[bytes]
COMPLETION: dict[str, Any] = {
    "id": "1",
    "object": "chat.completion",
    "created": 0,
    "model": "m-2026",
    "choices": [
        {
            "index": number,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": f"text {number}", "refusal": None},
            "logprobs": {"content": [{"token": "x", "logprob": -0.5, "bytes": None, "top_logprobs": []}]},
        }
        for number in range(2)
    ],
    "usage": {
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "total_tokens": 15,
        "completion_tokens_details": {"reasoning_tokens": 1},
    },
}
HALF = "\ud83d"


@dataclass
class Foreign:
    """What the server answers next, as it goes over the wire, `pause` seconds before each part; `seen` are requests."""

    parts: Parts = ()
    pause: float = 0.0
    seen: list[dict[str, str]] = field(default_factory=list)


@contextmanager
def answering(foreign: Foreign) -> Iterator[str]:
    """The base URL of a server that answers what `foreign` holds, whatever it is asked, and hangs up."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            foreign.seen.append({"path": self.path, **{name.lower(): value for name, value in self.headers.items()}})
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            for part in foreign.parts:
                time.sleep(foreign.pause)
                self.wfile.write(part)
                self.wfile.flush()

        do_POST = do_GET  # noqa: N815 (the library's name)

    with handled_by(Handler) as address:
        yield f"{address}/v1"


def response(body: bytes, *headers: str, status: int = 200) -> bytes:
    """A response as it goes over the wire."""
    lines = [f"HTTP/1.1 {status} X", "Content-Type: application/json", f"Content-Length: {len(body)}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8", "surrogateescape") + body


def completion(**changes: Any) -> bytes:
    """A completion with other values at its top."""
    return json.dumps({**COMPLETION, **changes}).encode()


def choice(**changes: Any) -> bytes:
    """A completion whose first choice has other values."""
    return completion(choices=[{**COMPLETION["choices"][0], **changes}])


def bomb(megabytes: int, *, wbits: int = 31) -> bytes:
    """Zeros, compressed a thousandfold."""
    packer = zlib.compressobj(9, wbits=wbits)
    return b"".join([*(packer.compress(bytes(1_000_000)) for _ in range(megabytes)), packer.flush()])


def usage(**changes: Any) -> bytes:
    """A completion with another usage."""
    return completion(usage={**COMPLETION["usage"], **changes})


def nested(depth: int) -> Any:
    """Lists in lists, as text: no library would write them."""
    return f"{'[' * depth}{']' * depth}"


BODIES: dict[str, Callable[[], bytes]] = {
    "huge prompt_tokens": lambda: usage(prompt_tokens=10**400),
    "numbers whose sum is too long to be written": lambda: usage(other=10**4299 * 9),
    "a number that is too long to be read": lambda: completion().replace(b"10,", b"1" * 5000 + b","),
    "usage of booleans": lambda: usage(prompt_tokens=True, completion_tokens=True),
    "usage of lists": lambda: completion(usage=[[1], {"prompt_tokens": 1}]),
    "usage of dicts": lambda: usage(prompt_tokens={"a": 1}, completion_tokens={"a": {"b": [1]}}),
    "usage of NaN": lambda: usage(prompt_tokens=float("nan"), completion_tokens=float("inf"), cost=float("nan")),
    "usage of many names": lambda: completion(usage={**COMPLETION["usage"], **{str(i): i for i in range(20_000)}}),
    "negative usage": lambda: usage(prompt_tokens=-1, completion_tokens=-(10**30)),
    "many choices": lambda: completion(choices=[{"text": ""}] * 60_000),
    "deep choices": lambda: completion().replace(b'"stop"', nested(900).encode()),
    "very deep choices": lambda: completion().replace(b'"stop"', nested(100_000).encode()),
    "deep usage": lambda: completion().replace(b'"reasoning_tokens": 1', f'"a": {nested(500)}'.encode()),
    "lone surrogates": lambda: choice(message={"role": HALF, "content": f"cut {HALF}", HALF: HALF}),
    "half a model": lambda: completion(model=f"m{HALF}\r\nX-Evil: 1"),
    "a long model": lambda: completion(model="m" * 900_000),
    "an object as model": lambda: completion(model={"a": 1}),
    "a long text": lambda: choice(message={"content": "x y " * 240_000}),
    "finish_reason as an object": lambda: choice(finish_reason={"a": [1]}),
    "an index as an object": lambda: choice(index={"a": {"b": [1, 2]}}),
    "a huge index": lambda: choice(index=10**4000),
    "odd tool calls": lambda: choice(message={"content": None, "tool_calls": {"a": [None, 1]}}),
    "a message as a list": lambda: choice(message=[1], text="x"),
    "a text without a message": lambda: completion(choices=[{"text": "x"}]),
    "content as parts": lambda: choice(message={"content": [{"text": "a"}, 5, {"text": {"b": 1}}, {}]}),
    "content as a number": lambda: choice(message={"content": 5}),
    "logprobs of NaN": lambda: choice(logprobs={"content": [{"logprob": float("nan")}]}),
    "logprobs that add up to infinity": lambda: choice(logprobs={"token_logprobs": [1.7e308] * 9}),
    "logprobs as a text": lambda: choice(logprobs="x"),
    "a refusal as an object": lambda: choice(message={"content": None, "refusal": {"a": 1}}),
    "invalid UTF-8": lambda: completion().replace(b"text 0", b"\xff\xfe\x80"),
    "UTF-16": lambda: json.dumps(COMPLETION).encode("utf-16"),
    "duplicate keys": lambda: b'{"choices": [], ' + completion()[1:],
    "a list": lambda: b"[]",
    "nothing": lambda: b"",
    "NaN": lambda: b"NaN",
    "an endless number": lambda: b"1" * 900_000,
    "endless white space": lambda: b" " * 900_000,
    "a text without an end": lambda: b'{"choices": ["' + b"\\" * 900_000,
    "millions of values": lambda: completion(choices=[[]] * 200_000),
}
"""Bodies with status 200."""
COMPRESSED = bomb(64)
RESPONSES: dict[str, Callable[[], bytes]] = {
    "a bomb": lambda: response(COMPRESSED, "Content-Encoding: gzip"),
    "a bomb by deflate": lambda: response(bomb(64, wbits=15), "Content-Encoding: deflate"),
    "a bomb in an error": lambda: response(COMPRESSED, "Content-Encoding: gzip", status=400),
    "a bomb by its charset": lambda: response(bomb(64, wbits=15), "Content-Type: application/json; charset=zlib"),
    "a charset that is not a text": lambda: response(b"00", "Content-Type: application/json; charset=hex"),
    "two encodings": lambda: response(COMPRESSED, "Content-Encoding: gzip, gzip"),
    "two headers of encodings": lambda: response(COMPRESSED, "Content-Encoding: gzip", "Content-Encoding: gzip"),
    "an unknown encoding": lambda: response(b"x", "Content-Encoding: br"),
    "broken gzip": lambda: response(b"no gzip at all", "Content-Encoding: gzip"),
    "half of gzip": lambda: response(COMPRESSED[:40], "Content-Encoding: gzip"),
    "a body that is announced too large": lambda: b"HTTP/1.1 200 X\r\nContent-Length: 99999999999\r\n\r\n{}",
    "a body without an end": lambda: b"HTTP/1.1 200 X\r\n\r\n" + bytes(40_000_000),
    "a large error": lambda: response(b'{"error": "' + b"x" * 5_000_000 + b'"}', status=400),
    "a deep error": lambda: response(nested(900).encode(), status=400),
    "an error of odd types": lambda: response(
        b'{"error": {"message": [1], "type": {}, "param": 5, "code": {"a": 1}}}', status=400
    ),
    "an error of no types": lambda: response(b'{"error": null}', status=422),
    "Retry-After beyond latin-1": lambda: response(b"{}", "Retry-After: später – nie", status=429),
    "Retry-After of a year without end": lambda: response(
        b"{}", "Retry-After: Mon, 01 Jan 99999999999999999999 00:00:00 GMT", status=429
    ),
    "an endless Retry-After": lambda: response(b"{}", f"Retry-After: {'9' * 5000}", status=429),
    "Retry-After of NaN": lambda: response(b"{}", "Retry-After: nan", "Retry-After-Ms: inf", status=503),
    "a header of 90 KB": lambda: response(b"{}", f"Retry-After: {'x' * 90_000}", status=429),
    "a header of 1 MB": lambda: response(b"{}", f"X: {'x' * 1_000_000}"),
    "no HTTP": lambda: b"SSH-2.0-OpenSSH_9.6\r\n" * 10,
    **{f"status {status}": partial(response, b"{}", status=status) for status in (100, 101, 204, 301)},
    **{f"status {status}": partial(response, b"{}", status=status) for status in (399, 600, 777, 999)},
    "a redirect": lambda: response(b"", "Location: http://127.0.0.1:9/elsewhere", status=307),
}
"""Whole responses."""


def _paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(path for key, part in inner for path in _paths(part, (*here, key)))]


_ODD: st.SearchStrategy[Any] = st.sampled_from(
    [10**400, -1, 1e308, float("nan"), float("inf"), True, HALF, "\x00\n", "", [], {}, [[[]]], None]
)
_VALUES = _ODD | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A completion with other values at one to three places, sometimes with other bytes too."""
    values: Any = copy.deepcopy(COMPLETION)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(_paths(values)))
        new = copy.deepcopy(draw(_VALUES))  # drawn lists are shared, and are changed below
        if not path:
            values = new
            continue
        inside = values
        for key in path[:-1]:
            inside = inside[key]
        inside[path[-1]] = new
    data = json.dumps(values).encode()
    if draw(st.integers(0, 4)) == 0 and data:
        at = draw(st.integers(0, len(data) - 1))
        data = data[:at] + draw(st.binary(max_size=4)) + data[at + draw(st.integers(0, 3)) :]
    return data
