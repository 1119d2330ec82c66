"""Reads and checks request bodies for both services, and refuses those that break a limit.

Checks run in this order: content type; size and time while the body arrives; number of values and depth of the raw
bytes, before any object is built; JSON; lengths of the texts. Large bodies are processed in a thread, one at a time, so
that the event loop is not blocked.
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
"""Status in the access log for a request whose client closed the connection (nginx's convention)."""
RECEIVE_SECONDS = 20.0
"""Time limit for receiving a body."""
MAX_DEPTH = 64
MAX_VALUES = 32_768
LARGE_BYTES = 32_768
"""Bodies from this size on are processed in a thread; for smaller ones switching threads costs more than the work."""
MAX_BODIES_IN_MEMORY = 16
"""How many bodies of the maximum size may be in memory at once, for all open requests together."""
Result = TypeVar("Result")
_BLOCK = 1 << 20
_DEPTH_CHANGES = np.zeros(256, np.int8)
_DEPTH_CHANGES[[ord("["), ord("{")]] = 1
_DEPTH_CHANGES[[ord("]"), ord("}")]] = -1
_LARGE_BODY_POOL = ThreadPoolExecutor(1, "bodies")
RULES = {
    "missing": "is missing",
    "extra_forbidden": "is not supported; leave it out",
    "string_type": "must be a string",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "too_short": "must have at least {min_length} items",
    "too_long": "must have at most {max_length} items",
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
"""pydantic's error type -> the rule that the field breaks."""

MAX_NAME_CHARACTERS = 60
"""A field name chosen by the client is repeated in errors up to this length."""


class Refusal(Exception):  # noqa: N818 (not an error of ours)
    """A refused request: a status 4xx or 5xx and one line with problem and remedy; `retry_after` in whole seconds."""

    def __init__(self, status: int, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after = retry_after


@dataclass(frozen=True, kw_only=True)
class Violation:
    """The first rule that a body breaks.

    `field` is a path such as `pairs.0.1` (empty for the body itself), `more` the number of other fields with errors.
    """

    field: str
    rule: str
    more: int

    def __str__(self) -> str:
        return f"{self.field or 'body'}: {self.rule}" + (f" (and {self.more} more)" if self.more else "")


def describe_error(error: ValidationError, body: object) -> Violation:
    """Describes what is wrong with `body` without repeating its texts."""
    errors = error.errors(include_url=False, include_input=False)
    # If a field may have several types, our validators' message is more helpful than pydantic's on the first type.
    first = next((item for item in errors if item["type"] == "value_error"), errors[0])
    template = RULES.get(first["type"])
    rule = template.format(**first.get("ctx", {})) if template else first["msg"].removeprefix("Value error, ")
    paths = {_field_path(item["loc"], body, item["type"]) for item in errors}
    return Violation(field=_field_path(first["loc"], body, first["type"]), rule=rule, more=len(paths) - 1)


def _field_path(location: Sequence[int | str], body: object, kind: str) -> str:
    """The path of a field in the body, without the names of union members that pydantic inserts."""
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
    """Limits of a body; `max_text_bytes` counts all texts in UTF-8 (equal texts once in a request for scores)."""

    max_values: int = MAX_VALUES
    max_depth: int = MAX_DEPTH
    max_characters: int = BodyLimits.max_characters
    """Limit of one text: scorers would truncate a longer one, and tokenizing it would delay other requests."""
    max_text_bytes: int = round(BodyLimits.max_text_mb * 1e6)
    """A tokenizer processes 2 to 3 MB a second and takes 60 bytes of memory per byte (2 cores, AMD EPYC)."""
    remedy: str = "send a smaller request"

    def check(self, data: bytes) -> None:
        """Raises Refusal 400 if JSON is nested too deeply, 413 if it has too many values; builds no objects."""
        num_openings = data.count(b"[") + data.count(b"{")
        if num_openings <= self.max_depth and num_openings + data.count(b",") <= self.max_values:
            return
        values, depth = measure(data, self)
        if depth > self.max_depth:
            raise Refusal(400, f"the JSON is nested deeper than {self.max_depth} levels; send a flatter body")
        self.check_count(values)

    def check_count(self, values: int) -> None:
        """Raises Refusal 413 if there are too many values."""
        if values > self.max_values:
            raise Refusal(413, f"the body has more than {self.max_values} values; {self.remedy}")

    def parse(self, data: bytes) -> object:
        """Parses JSON; raises Refusal if it is out of bounds, ValueError if it is not JSON."""
        self.check(data)
        return from_json(data)

    def check_texts(self, texts: Collection[str]) -> None:
        """Raises Refusal 413 if one text, or all texts together, are too long."""
        max_length = max(map(len, texts), default=0)
        if max_length > self.max_characters:
            limit = f"at most {self.max_characters} are accepted"
            raise Refusal(413, f"a text has {max_length} characters, {limit}; send a shorter one")
        # A character has at most four bytes in UTF-8, so usually nothing needs to be encoded.
        if 4 * sum(map(len, texts)) <= self.max_text_bytes:
            return
        total = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
        if total > self.max_text_bytes:
            raise Refusal(
                413, f"the texts have {total} bytes, at most {self.max_text_bytes} are accepted; {self.remedy}"
            )


def measure(data: bytes, bounds: Bounds | None = None) -> tuple[int, int]:
    """Returns an upper bound on the number of values in raw JSON, and its depth; stops counting beyond `bounds`.

    Counts commas and opening brackets outside of strings. For invalid JSON the counts are correct as far as the first
    error, where parsing stops too.
    """
    if b"\\" in data:
        # Backslashes only occur in strings. Pairs escape each other; a single one escapes the next character.
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


async def run_in_thread_if_large(size: int, work: Callable[[], Result]) -> Result:
    """Returns the result of `work`; runs it in a thread if it processes a large body (`size` in bytes)."""
    if size < LARGE_BYTES:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_LARGE_BODY_POOL, work)


async def wait_for_disconnect(request: Request) -> None:
    """Returns when the client has closed the connection; the body must have been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


@dataclass(eq=False)
class BodyBudget:
    """Limits the memory of all bodies that are held at once; beyond `max_bytes` a request is refused."""

    max_bytes: int
    used_bytes: int = 0

    @contextlib.contextmanager
    def reserve(self) -> Iterator["Reservation"]:
        """Yields a reservation for one request, which is released at the end of the block."""
        reservation = Reservation(self)
        try:
            yield reservation
        finally:
            reservation.release()


@dataclass(eq=False)
class Reservation:
    """The bytes that one request has reserved in a budget."""

    budget: BodyBudget
    num_bytes: int = field(default=0, init=False)

    def extend(self, num_bytes: int) -> None:
        """Reserves more bytes; raises Refusal 503 if the budget does not have them."""
        if self.budget.used_bytes + num_bytes > self.budget.max_bytes:
            raise Refusal(503, "too many large bodies are being read; try again later", retry_after=1)
        self.budget.used_bytes += num_bytes
        self.num_bytes += num_bytes

    def transfer(self) -> "Reservation":
        """Moves the reserved bytes to a new reservation, which the caller must release."""
        reservation = Reservation(self.budget)
        reservation.num_bytes, self.num_bytes = self.num_bytes, 0
        return reservation

    def release(self) -> None:
        """Returns all reserved bytes to the budget."""
        self.budget.used_bytes -= self.num_bytes
        self.num_bytes = 0


def _check_content_type(headers: Headers, extra_types: Collection[str] = ()) -> None:
    """Raises Refusal 415 unless the body is sent as JSON or as one of `extra_types` ("" means no type).

    Browsers let a page of another site send other types, or none, without a preflight request.
    """
    values = headers.getlist("content-type")
    types = [value.split(";")[0].strip().lower() for value in values] or [""]
    if len(types) == 1 and (types[0] in extra_types or _is_json(types[0])):
        return
    problem = "no content type" if types == [""] else "an unsupported content type"
    raise Refusal(415, f"the body has {problem}; send it with the header Content-Type: application/json")


def _is_json(content_type: str) -> bool:
    is_suffixed = content_type.startswith("application/") and content_type.endswith("+json")
    return content_type == "application/json" or is_suffixed


async def receive_body(
    request: Request,
    max_bytes: int,
    remedy: str,
    seconds: float = RECEIVE_SECONDS,
    *,
    types: Collection[str] = (),
    reservation: Reservation | None = None,
) -> bytes:
    """Receives the body of a request and reserves its bytes.

    Raises Refusal 415 if it is sent as another type than JSON or `types`, 413 above `max_bytes`, whether announced or
    not, and 408 if it does not arrive within `seconds`.
    """
    _check_content_type(request.headers, types)
    too_large = Refusal(413, f"the body is larger than {max_bytes} bytes; {remedy}")
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
        raise Refusal(CLIENT_CLOSED_REQUEST, "the client closed the connection") from error
    except TimeoutError as error:
        raise Refusal(408, f"the body did not arrive within {seconds:g} s; send it again") from error
    return bytes(body)


def distinct_texts(pairs: Sequence[tuple[str, str]]) -> Collection[str]:
    """The distinct texts of these pairs: equal texts are tokenized once."""
    return {text for pair in pairs for text in pair}
