"""What went wrong with a request, and what follows: another attempt, another request, a failed instance, the end."""

import email.utils
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import openai

from cappy.records.instance import Status
from cappy.redaction import one_line
from cappy.sampling.endpoint.capabilities import refused_parameter
from cappy.sampling.endpoint.keys import FILE_VARIABLE, KEY_VARIABLE
from cappy.untrusted import read_json

LONGEST_WAIT = 30.0
LONGEST_RETRY_AFTER = 600.0
_TOO_LONG = (
    "context_length_exceeded",
    "context length",
    "context window",
    "maximum input length",
    "prompt is too long",
)
_FILTERED = ("content_filter", "content_policy_violation", "content management policy")
_SPENT = ("insufficient_quota", "billing_hard_limit_reached")
_PASSING = (408, 409, 425, 429)
_READ = 2000
"""Characters of what an error says that are looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """`kind` says what follows: `again` after `wait` seconds (None: by backoff), `without` the parameter, the
    instruction `unanswered` with a status, or the `end` of the run with its remedy.
    """

    kind: Literal["again", "without", "unanswered", "end"]
    reason: str
    wait: float | None = None
    parameter: str = ""
    status: Status = "failed"
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """What the body of an error says, each in one line without secrets; empty where it does not say it."""

    message: str = ""
    kind: str = ""
    param: str = ""
    code: str = ""


def read_refusal(body: bytes, keys: Sequence[str] = ()) -> Refusal:
    """The error object in a body, in the shapes that servers use; a body that is no JSON is the message.

    `keys` are secrets beside those that this process knows.
    """
    try:
        values = read_json(body)
    except (ValueError, RecursionError):
        return Refusal(message=one_line(body.decode("utf-8", "replace"), _READ, *keys))
    inner = values.get("error", values) if isinstance(values, dict) else values
    if not isinstance(inner, dict):
        return Refusal(message=one_line(str(inner), _READ, *keys))
    message = inner.get("message") or inner.get("detail") or inner.get("error") or (inner if inner else "")

    def line(value: object) -> str:
        return "" if value is None else one_line(str(value), _READ, *keys)

    kind, param, code = (line(inner.get(name)) for name in ("type", "param", "code"))
    return Refusal(message=line(message), kind=kind, param=param, code=code)


def judge(error: Exception, sent: Mapping[str, Any]) -> Fault:
    """What follows from what the client raised, or from an answer that was none."""
    if isinstance(error, openai.APIStatusError):
        return _judge_status(error, sent)
    if isinstance(error, openai.APIConnectionError):
        # The client's own text is "Connection error."; what it came from says why.
        reason = str(error.__cause__ or error) or type(error.__cause__ or error).__name__
        return Fault(kind="again", reason=one_line(f"no answer ({reason})", _READ))
    return Fault(kind="again", reason=one_line(str(error), _READ))


def backoff(attempt: int, first: float) -> float:
    """Seconds before attempt `attempt` (from 1): doubled each time, up to `LONGEST_WAIT`, less up to a quarter."""
    return float(min(first * 2.0 ** (attempt - 1), LONGEST_WAIT)) * (1 - 0.25 * random.random())


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a response asks to wait, from its number or its date; None if it asks for none."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        return seconds if 0 <= seconds < float("inf") else None
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        return max(0.0, date.timestamp() - time.time())
    except (ValueError, TypeError, IndexError, OverflowError, OSError):
        # Not a date.
        return None


def _judge_status(error: openai.APIStatusError, sent: Mapping[str, Any]) -> Fault:
    status, refusal = error.status_code, read_refusal(error.response.content)
    message = refusal.message or error.response.reason_phrase or "without a word"
    told = f"{status} {message}"
    clue = f"{refusal.code} {refusal.kind} {message}".lower()
    if status < 400 or status > 599:
        return Fault(kind="end", reason=told, remedy="check the address in the spec")
    if status in (401, 403):
        return Fault(kind="end", reason=told, remedy=f"set {KEY_VARIABLE}, or {FILE_VARIABLE} for a mounted file")
    if status == 404:
        return Fault(kind="end", reason=told, remedy="check the model's name and the address in the spec")
    if status == 429 and any(word in clue for word in _SPENT):
        return Fault(kind="end", reason=told, remedy="the account has nothing left; top it up")
    if status in _PASSING or status >= 500:
        return _passing(told, retry_after(error.response.headers))
    if any(word in clue for word in _FILTERED):
        return Fault(kind="unanswered", reason=told, status="filtered")
    if status == 413 or any(word in clue for word in _TOO_LONG):
        return Fault(kind="unanswered", reason=told)
    parameter = refused_parameter(sent, message, refusal.param)
    if status in (400, 422) and parameter:
        return Fault(kind="without", reason=told, parameter=parameter)
    return Fault(kind="end", reason=told, remedy="check what the endpoint takes")


def _passing(told: str, wait: float | None) -> Fault:
    if wait is not None and wait > LONGEST_RETRY_AFTER:
        return Fault(kind="end", reason=told, remedy=f"it asks to wait {wait:,.0f} s; come back then")
    return Fault(kind="again", reason=told, wait=wait)
