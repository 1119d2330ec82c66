"""The guard of every body that a client sends, for both services; and refusals, in the words of whoever sent it.

In this order: content type, then bytes and time while it arrives, then the number of values and the depth on the raw
bytes, before any object is built, then JSON, then the lengths of its texts. What is large is worked on in a thread, one
body at a time, so that the event loop goes on answering.
"""

import asyncio
import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from fastapi import Request
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect

from serving.config import BodyLimits

CLIENT_CLOSED_REQUEST = 499
"""What the log calls a request whose client hung up (a custom of nginx)."""
RECEIVE_SECONDS = 20.0
"""Within which a body must have arrived."""
MAX_DEPTH = 64
MAX_VALUES = 32_768
LARGE_BYTES = 32_768
"""From here a body is worked on in a thread: below it a change of threads costs more than the work."""
MAX_BODIES_IN_MEMORY = 16
"""How many bodies of the largest size may be in memory, over all requests that are not answered yet."""
Result = TypeVar("Result")
_BLOCK = 1 << 20
_DEPTH_CHANGES = np.zeros(256, np.int8)
_DEPTH_CHANGES[[ord("["), ord("{")]] = 1
_DEPTH_CHANGES[[ord("]"), ord("}")]] = -1
_LARGE = ThreadPoolExecutor(1, "bodies")
RULES = {
    "missing": "is missing",
    "extra_forbidden": "cannot be honoured here; leave it out",
    "string_type": "must be a text",
    "string_too_short": "may not be empty",
    "string_too_long": "may have at most {max_length} characters",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "too_short": "must have {min_length} or more items",
    "too_long": "may have at most {max_length} items",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
}
"""pydantic's kind of error -> what the field must be."""

MAX_NAME_CHARACTERS = 60
"""Characters that are repeated of a name which a client chose."""


class Refusal(Exception):  # noqa: N818 (not an error of ours)
    """Status 4xx or 5xx with what was wrong and what to do, in one line; `retry_after` in whole seconds."""

    def __init__(self, status: int, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after = retry_after


@dataclass(frozen=True, kw_only=True)
class Violation:
    """The first rule that a body breaks: where (`pairs.0.1`, empty for the body itself), which, and how many more."""

    field: str
    rule: str
    more: int

    def __str__(self) -> str:
        return f"{self.field or 'body'}: {self.rule}" + (f" (and {self.more} more)" if self.more else "")


def describe_error(error: ValidationError, body: object) -> Violation:
    """What is wrong with `body`, none of whose texts are repeated."""
    errors = error.errors(include_url=False, include_input=False)
    # Where a field may have several forms, a sentence of ours says more than that it has not the first form.
    first = next((item for item in errors if item["type"] == "value_error"), errors[0])
    template = RULES.get(first["type"])
    rule = template.format(**first.get("ctx", {})) if template else first["msg"].removeprefix("Value error, ")
    paths = {_field_path(item["loc"], body, item["type"]) for item in errors}
    return Violation(field=_field_path(first["loc"], body, first["type"]), rule=rule, more=len(paths) - 1)


def _field_path(location: Sequence[int | str], body: object, kind: str) -> str:
    """A location without the names of the forms that a field may have, which pydantic puts between its steps."""
    path, value = [], body
    for index, key in enumerate(location):
        if isinstance(key, int):
            value = value[key] if isinstance(value, list) and key < len(value) else None
        elif isinstance(value, Mapping) and (key in value or (kind == "missing" and index == len(location) - 1)):
            value = value.get(key)
        else:
            continue
        path.append(str(key)[:MAX_NAME_CHARACTERS])
    return ".".join(path)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a body may hold; `max_text_bytes` counts all its texts in UTF-8, equal ones of a request for scores once."""

    max_values: int = MAX_VALUES
    max_depth: int = MAX_DEPTH
    max_characters: int = BodyLimits.max_characters
    """Of one text: beyond it no scorer reads on, and tokenizing it would hold up the others."""
    max_text_bytes: int = round(BodyLimits.max_text_mb * 1e6)
    """A tokenizer reads 2 to 3 MB in a second and takes 60 bytes of memory for each (2 cores, AMD EPYC)."""
    remedy: str = "send less in a request"

    def check(self, data: bytes) -> None:
        """Refusal 400 where JSON is nested too deeply, 413 where it has too many values; builds none of them."""
        num_openings = data.count(b"[") + data.count(b"{")
        if num_openings <= self.max_depth and num_openings + data.count(b",") <= self.max_values:
            return
        values, depth = measure(data, self)
        if depth > self.max_depth:
            text = f"the body is not JSON that is read here: it is nested deeper than {self.max_depth}"
            raise Refusal(400, f"{text}; send a flatter one")
        self.check_count(values)

    def check_count(self, values: int) -> None:
        """Refusal 413 where there are too many values."""
        if values > self.max_values:
            raise Refusal(413, f"the body has more than {self.max_values} values; {self.remedy}")

    def parse(self, data: bytes) -> object:
        """The JSON; Refusal where it is out of bounds, ValueError where it is none."""
        self.check(data)
        return from_json(data)

    def check_texts(self, texts: Collection[str]) -> None:
        """Refusal 413 where one text is too long, or all together are."""
        max_length = max(map(len, texts), default=0)
        if max_length > self.max_characters:
            raise Refusal(413, f"a text of {max_length} characters is above {self.max_characters}; send a shorter one")
        # UTF-8 has one to four bytes for a character, so most need not be counted.
        if 4 * sum(map(len, texts)) <= self.max_text_bytes:
            return
        total = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
        if total > self.max_text_bytes:
            raise Refusal(413, f"the texts have {total} bytes, above {self.max_text_bytes}; {self.remedy}")


def measure(data: bytes, bounds: Bounds | None = None) -> tuple[int, int]:
    """(most values, depth) of JSON in bytes: commas and openings outside of texts; counting ends beyond `bounds`.

    For invalid JSON it is the same up to the first error, where parsing stops too.
    """
    if b"\\" in data:
        # Backslashes stand in texts alone. In pairs they escape each other; one that is left escapes what follows.
        data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    codes = np.frombuffer(data, np.uint8)
    values = depth = max_depth = in_string = 0
    for start in range(0, len(codes), _BLOCK):
        block = codes[start : start + _BLOCK]
        is_quoted = np.bitwise_xor.accumulate((block == ord('"')).view(np.uint8)) ^ np.uint8(in_string)
        in_string = int(is_quoted[-1])
        outside = block[is_quoted == 0]
        depth_changes = _DEPTH_CHANGES[outside]
        values += int(np.count_nonzero(outside == ord(","))) + int(np.count_nonzero(depth_changes == 1))
        levels = np.cumsum(depth_changes, dtype=np.int32)
        if len(levels):
            max_depth = max(max_depth, depth + int(levels.max()))
            depth += int(levels[-1])
        if bounds and (values > bounds.max_values or max_depth > bounds.max_depth):
            break
    return values, max_depth


async def run_in_thread(size: int, work: Callable[[], Result]) -> Result:
    """What the work gives: in a thread where it is about a large body of `size` bytes."""
    if size < LARGE_BYTES:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_LARGE, work)


@dataclass(eq=False)
class BodyBudget:
    """Bytes of bodies that are held at once; beyond `most` a request is refused, so that memory has an end."""

    max_bytes: int
    used_bytes: int = 0

    @contextlib.contextmanager
    def reserve(self) -> Iterator["Reservation"]:
        """A request's share, given back at the end of the block."""
        reservation = Reservation(self)
        try:
            yield reservation
        finally:
            reservation.release()


@dataclass(eq=False)
class Reservation:
    """What one request holds of a budget."""

    budget: BodyBudget
    num_bytes: int = field(default=0, init=False)

    def extend(self, num_bytes: int) -> None:
        """Refusal 503 where the budget has no room for so many bytes more."""
        if self.budget.used_bytes + num_bytes > self.budget.max_bytes:
            raise Refusal(503, "too many large bodies are being read; ask again later", retry_after=1)
        self.budget.used_bytes += num_bytes
        self.num_bytes += num_bytes

    def transfer(self) -> "Reservation":
        """All of it as a share that is released by itself; this one holds nothing any more."""
        reservation = Reservation(self.budget)
        reservation.num_bytes, self.num_bytes = self.num_bytes, 0
        return reservation

    def release(self) -> None:
        """Gives all of it back."""
        self.budget.used_bytes -= self.num_bytes
        self.num_bytes = 0


def _check_content_type(headers: Headers, extra_types: Collection[str] = ()) -> None:
    """Refusal 415 unless the body is sent as JSON, or as one of the `further` types ("" is none at all).

    A page of another site can send other types, or none, without asking first.
    """
    values = headers.getlist("content-type")
    types = [value.split(";")[0].strip().lower() for value in values] or [""]
    if len(types) == 1 and (types[0] in extra_types or _is_json(types[0])):
        return
    problem = "no content type" if types == [""] else "another content type"
    raise Refusal(415, f"the body came with {problem}; send it with the header Content-Type: application/json")


def _is_json(content_type: str) -> bool:
    return content_type == "application/json" or (
        content_type.startswith("application/") and content_type.endswith("+json")
    )


async def receive_body(
    request: Request,
    max_bytes: int,
    remedy: str,
    seconds: float = RECEIVE_SECONDS,
    *,
    types: Collection[str] = (),
    reservation: Reservation | None = None,
) -> bytes:
    """The body; Refusal 415 if it is sent as something else than JSON or these types.

    Refusal 413 above `most` bytes, announced or not, and 408 where it does not arrive in time. What it takes is taken
    of `share`.
    """
    _check_content_type(request.headers, types)
    too_large = Refusal(413, f"the body is above {max_bytes} bytes; {remedy}")
    announced = request.headers.get("content-length", "0")
    if announced.isascii() and announced.isdigit() and (len(announced) > 18 or int(announced) > max_bytes):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                if len(body) + len(chunk) > max_bytes:
                    raise too_large
                if reservation is not None:
                    reservation.extend(len(chunk))
                body += chunk
    except ClientDisconnect as error:
        raise Refusal(CLIENT_CLOSED_REQUEST, "the client hung up") from error
    except TimeoutError as error:
        raise Refusal(408, f"the body did not arrive within {seconds:g} s; send it again") from error
    return bytes(body)


def distinct_texts(pairs: Sequence[tuple[str, str]]) -> Collection[str]:
    """Every text of these pairs once, as they are tokenized."""
    return {text for pair in pairs for text in pair}
