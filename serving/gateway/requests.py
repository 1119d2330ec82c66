"""Reads the parts of a chat completion request that the gateway uses; the rest goes to the LLM unchanged.

It also converts a conversation to one text, the instruction for the scorer.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serving.bodies import Bounds, Refusal, describe_error
from serving.gateway.config import ChatLimits
from serving.gateway.errors import INVALID_REQUEST, GatewayError

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
_ERROR_CODES = {
    401: "invalid_api_key",
    408: "timeout",
    413: "body_too_large",
    415: "unsupported_content_type",
    503: "overloaded",
}
_NO_TOOLS = "tool calls cannot be scored; send such requests to the LLM directly"
UNSUPPORTED = {
    "tools": _NO_TOOLS,
    "functions": _NO_TOOLS,
    "function_call": _NO_TOOLS,
    "audio": "audio cannot be scored; send such requests to the LLM directly",
}
"""Unsupported parameter -> the reason."""
REMEDY = "send a shorter conversation"
BOUNDS = Bounds(max_values=ChatLimits.max_values, remedy=REMEDY)
"""Default bounds. Values are limited because the body is serialized again for every call to the LLM."""
_ROLES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}
_MAX_DIGITS = 100


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _CheckedFields(BaseModel):
    """Types of the parameters that the gateway reads; ranges that depend on the model are checked by the LLM."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: Annotated[str, Field(min_length=1)]
    messages: Annotated[list[dict[str, object]], Field(min_length=1, fail_fast=True)]
    n: Count | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    seed: Annotated[int, Field(ge=-(2**62), le=2**62)] | None = None
    logprobs: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A valid request: `body` as the client sent it, and the fields that the gateway uses.

    `count` is the requested number of choices, `max_tokens` the client's limit on a response.
    """

    body: Mapping[str, object]
    instruction: str
    model: str
    count: int
    stream: bool
    include_usage: bool
    temperature: float | None
    top_p: float | None
    seed: int | None
    logprobs: bool
    max_tokens: int | None


def read_object(data: bytes, bounds: Bounds) -> dict[str, object]:
    """Parses a JSON object with finite numbers and without lone surrogates.

    Raises GatewayError 400 for anything else, and 413 if it is out of bounds, if possible before building objects.
    """
    try:
        bounds.check(data)
        values = json.loads(data.decode("utf-8"), parse_int=_parse_integer)
        if not isinstance(values, dict):
            raise GatewayError(400, "the body must be a JSON object")
        texts, floats = _leaves(values)
        bounds.check_texts(texts)
        if not all(map(math.isfinite, floats)):
            raise ValueError
        for text in texts:
            text.encode("utf-8")
    except Refusal as refusal:
        raise to_openai_error(refusal) from None
    except UnicodeEncodeError:
        raise GatewayError(400, "a text of the body has a lone surrogate; send valid Unicode") from None
    except UnicodeDecodeError:
        raise GatewayError(400, "the body is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise GatewayError(400, f"the body is not valid JSON (line {error.lineno}, column {error.colno})") from None
    except ValueError:
        reason = f"a number is not finite or has more than {_MAX_DIGITS} digits"
        raise GatewayError(400, f"the body is not valid JSON ({reason})") from None
    return values


def _parse_integer(digits: str) -> int:
    """Parses an integer; raises ValueError for a very long one, since writing it takes quadratic time."""
    if len(digits) > _MAX_DIGITS:
        raise ValueError
    return int(digits)


def _leaves(values: object) -> tuple[list[str], list[float]]:
    """All strings, including field names, and all floats of a JSON value."""
    texts: list[str] = []
    floats: list[float] = []
    stack: list[object] = [values]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, float):
            floats.append(value)
        elif isinstance(value, dict):
            texts += value
            stack += value.values()
        elif isinstance(value, list):
            stack += value
    return texts, floats


def read_request(data: bytes, *, max_choices: int, bounds: Bounds = BOUNDS) -> ChatRequest:
    """Reads the request in a body; raises GatewayError 400 if it is invalid or not supported."""
    body = read_object(data, bounds)
    for name, reason in UNSUPPORTED.items():
        if body.get(name):
            raise GatewayError(400, f"{name}: {reason}", param=name, code="unsupported_parameter")
    try:
        checked = _CheckedFields.model_validate(body)
    except ValidationError as error:
        raise validation_error(error, body) from None
    if (checked.n or 1) > max_choices:
        text = f"n is {checked.n}, but this gateway samples at most {max_choices} candidates; request fewer choices"
        raise GatewayError(400, text, param="n")
    if checked.stream_options is not None and not checked.stream:
        raise GatewayError(400, "stream_options is only allowed with stream: true", param="stream_options")
    options = checked.stream_options or _StreamOptions()
    return ChatRequest(
        body=body,
        instruction=_check_length(instruction_of(checked.messages), bounds.max_characters),
        model=checked.model,
        count=checked.n or 1,
        stream=bool(checked.stream),
        include_usage=bool(options.include_usage),
        temperature=checked.temperature,
        top_p=checked.top_p,
        seed=checked.seed,
        logprobs=bool(checked.logprobs),
        max_tokens=checked.max_completion_tokens or checked.max_tokens,
    )


def to_openai_error(refusal: Refusal) -> GatewayError:
    """A refusal in OpenAI's shape."""
    headers = {} if refusal.retry_after is None else {"Retry-After": str(refusal.retry_after)}
    kind = "server_error" if refusal.status >= 500 else INVALID_REQUEST
    return GatewayError(
        refusal.status, refusal.message, kind=kind, code=_ERROR_CODES.get(refusal.status), headers=headers
    )


def _check_length(instruction: str, max_characters: int) -> str:
    if len(instruction) > max_characters:
        limit = f"at most {max_characters} are accepted"
        text = f"the conversation has {len(instruction)} characters, {limit}; send a shorter one"
        raise GatewayError(400, text, param="messages", code="context_length_exceeded")
    return instruction


def validation_error(error: ValidationError, body: Mapping[str, object]) -> GatewayError:
    """The error for an invalid body: names the first field and its rule without repeating the client's texts."""
    first = describe_error(error, body)
    return GatewayError(400, str(first), param=first.field or None)


def instruction_of(messages: Sequence[Mapping[str, object]]) -> str:
    """Converts a conversation to the instruction for the scorer; raises GatewayError 400 for unsupported turns.

    A single user turn becomes its content, as in the scorers' training data. Otherwise every turn becomes
    `Role: content`, separated by blank lines; the role `developer` is OpenAI's newer name for `system`.
    """
    turns = [(_role(message, index), _content(message, index)) for index, message in enumerate(messages)]
    if len(turns) == 1 and turns[0][0] == "User":
        text = turns[0][1]
    else:
        text = "\n\n".join(f"{role}: {content}" for role, content in turns)
    if not any(content.strip() for _, content in turns):
        raise GatewayError(400, "messages have no text; give at least one message content", param="messages")
    return text


def _role(message: Mapping[str, object], index: int) -> str:
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        roles = ", ".join(_ROLES)
        location = f"messages[{index}].role"
        text = f"{location} must be one of {roles}; tool messages cannot be scored, send them to the LLM directly"
        raise GatewayError(400, text, param=location)
    return _ROLES[role]


def _content(message: Mapping[str, object], index: int) -> str:
    """The text of a message; text parts are joined by newlines."""
    location = f"messages[{index}].content"
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise GatewayError(400, f"{location} must be a string or a list of text parts", param=location)
    return "\n".join(_part(part, f"{location}[{part_index}]") for part_index, part in enumerate(content))


def _part(part: object, location: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        text = f"{location} is not a text part; images, audio and files cannot be scored, send them to the LLM directly"
        raise GatewayError(400, text, param=location)
    if not isinstance(part.get("text"), str):
        raise GatewayError(400, f"{location}.text must be a string", param=f"{location}.text")
    return str(part["text"])
