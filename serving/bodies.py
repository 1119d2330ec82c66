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

GONE = 499
"""What the log calls a request whose client hung up (a custom of nginx)."""
SECONDS = 20.0
"""Within which a body must have arrived."""
MAX_DEPTH = 64
MAX_VALUES = 32_768
LARGE_BYTES = 32_768
"""From here a body is worked on in a thread: below it a change of threads costs more than the work."""
BODIES_AT_ONCE = 16
"""How many bodies of the largest size may be in memory, over all requests that are not answered yet."""
Result = TypeVar("Result")
_BLOCK = 1 << 20
_STEPS = np.zeros(256, np.int8)
_STEPS[[ord("["), ord("{")]] = 1
_STEPS[[ord("]"), ord("}")]] = -1
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

SHOWN = 60
"""Characters that are repeated of a name which a client chose."""


class Refusal(Exception):  # noqa: N818 (not an error of ours)
    """Status 4xx or 5xx with what was wrong and what to do, in one line; `retry_after` in whole seconds."""

    def __init__(self, status: int, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after = retry_after


@dataclass(frozen=True, kw_only=True)
class Broken:
    """The first rule that a body breaks: where (`pairs.0.1`, empty for the body itself), which, and how many more."""

    field: str
    rule: str
    more: int

    def __str__(self) -> str:
        return f"{self.field or 'body'}: {self.rule}" + (f" (and {self.more} more)" if self.more else "")


def describe_error(error: ValidationError, body: object) -> Broken:
    """What is wrong with `body`, none of whose texts are repeated."""
    errors = error.errors(include_url=False, include_input=False)
    # Where a field may have several forms, a sentence of ours says more than that it has not the first form.
    first = next((one for one in errors if one["type"] == "value_error"), errors[0])
    form = RULES.get(first["type"])
    rule = form.format(**first.get("ctx", {})) if form else first["msg"].removeprefix("Value error, ")
    fields = {_field(one["loc"], body, one["type"]) for one in errors}
    return Broken(field=_field(first["loc"], body, first["type"]), rule=rule, more=len(fields) - 1)


def _field(location: Sequence[int | str], body: object, kind: str) -> str:
    """A location without the names of the forms that a field may have, which pydantic puts between its steps."""
    kept, value = [], body
    for place, step in enumerate(location):
        if isinstance(step, int):
            value = value[step] if isinstance(value, list) and step < len(value) else None
        elif isinstance(value, Mapping) and (step in value or (kind == "missing" and place == len(location) - 1)):
            value = value.get(step)
        else:
            continue
        kept.append(str(step)[:SHOWN])
    return ".".join(kept)


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
        opened = data.count(b"[") + data.count(b"{")
        if opened <= self.max_depth and opened + data.count(b",") <= self.max_values:
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
        longest = max(map(len, texts), default=0)
        if longest > self.max_characters:
            raise Refusal(413, f"a text of {longest} characters is above {self.max_characters}; send a shorter one")
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
    values = depth = deepest = inside = 0
    for start in range(0, len(codes), _BLOCK):
        block = codes[start : start + _BLOCK]
        quoted = np.bitwise_xor.accumulate((block == ord('"')).view(np.uint8)) ^ np.uint8(inside)
        inside = int(quoted[-1])
        outside = block[quoted == 0]
        steps = _STEPS[outside]
        values += int(np.count_nonzero(outside == ord(","))) + int(np.count_nonzero(steps == 1))
        levels = np.cumsum(steps, dtype=np.int32)
        if len(levels):
            deepest = max(deepest, depth + int(levels.max()))
            depth += int(levels[-1])
        if bounds and (values > bounds.max_values or deepest > bounds.max_depth):
            break
    return values, deepest


async def apart(size: int, work: Callable[[], Result]) -> Result:
    """What the work gives: in a thread where it is about a large body of `size` bytes."""
    if size < LARGE_BYTES:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_LARGE, work)


@dataclass(eq=False)
class BodyBudget:
    """Bytes of bodies that are held at once; beyond `most` a request is refused, so that memory has an end."""

    most: int
    held: int = 0

    @contextlib.contextmanager
    def share(self) -> Iterator["Share"]:
        """A request's share, given back at the end of the block."""
        share = Share(self)
        try:
            yield share
        finally:
            share.release()


@dataclass(eq=False)
class Share:
    """What one request holds of a budget."""

    budget: BodyBudget
    size: int = field(default=0, init=False)

    def take(self, size: int) -> None:
        """Refusal 503 where the budget has no room for so many bytes more."""
        if self.budget.held + size > self.budget.most:
            raise Refusal(503, "too many large bodies are being read; ask again later", retry_after=1)
        self.budget.held += size
        self.size += size

    def hand_over(self) -> "Share":
        """All of it as a share that is released by itself; this one holds nothing any more."""
        other = Share(self.budget)
        other.size, self.size = self.size, 0
        return other

    def release(self) -> None:
        """Gives all of it back."""
        self.budget.held -= self.size
        self.size = 0


def _check_type(headers: Headers, further: Collection[str] = ()) -> None:
    """Refusal 415 unless the body is sent as JSON, or as one of the `further` types ("" is none at all).

    A page of another site can send other types, or none, without asking first.
    """
    given = headers.getlist("content-type")
    kinds = [one.split(";")[0].strip().lower() for one in given] or [""]
    if len(kinds) == 1 and (kinds[0] in further or _is_json(kinds[0])):
        return
    name = "no content type" if kinds == [""] else "another content type"
    raise Refusal(415, f"the body came with {name}; send it with the header Content-Type: application/json")


def _is_json(kind: str) -> bool:
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


async def receive_body(
    request: Request,
    most: int,
    remedy: str,
    seconds: float = SECONDS,
    *,
    types: Collection[str] = (),
    share: Share | None = None,
) -> bytes:
    """The body; Refusal 415 if it is sent as something else than JSON or these types.

    Refusal 413 above `most` bytes, announced or not, and 408 where it does not arrive in time. What it takes is taken
    of `share`.
    """
    _check_type(request.headers, types)
    large = Refusal(413, f"the body is above {most} bytes; {remedy}")
    announced = request.headers.get("content-length", "0")
    if announced.isascii() and announced.isdigit() and (len(announced) > 18 or int(announced) > most):
        raise large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                if len(body) + len(chunk) > most:
                    raise large
                if share is not None:
                    share.take(len(chunk))
                body += chunk
    except ClientDisconnect as error:
        raise Refusal(GONE, "the client hung up") from error
    except TimeoutError as error:
        raise Refusal(408, f"the body did not arrive within {seconds:g} s; send it again") from error
    return bytes(body)


def distinct(pairs: Sequence[tuple[str, str]]) -> Collection[str]:
    """Every text of these pairs once, as they are tokenized."""
    return {text for pair in pairs for text in pair}
