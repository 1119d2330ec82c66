"""What went wrong with a request, and what follows: another attempt, another request, a failed instance, the end.

A refusal is about one request or about all of them. Words that say which would never be listed in full, so the status
decides, and what became of the other requests:

- 401, 402, 3xx, an account without money: about all; the run ends.
- 403, 404, 405, 410, 415: about all, unless the endpoint has answered in this run: then about this one.
- 400, 413, 422 and any other: about this one, whose candidates are `failed`. So is a request whose attempts are used
  up while others, or else a plain question, are answered.
- A plain question is asked after the first refusal of a run, if its words do not say that it is about the instruction,
  and after `REFUSALS_PER_PROBE` refusals in a row: if that is refused too, they are about all.
- The share of failed candidates that `--max-failed` allows is the last bound (`cappy.sampling.accounts`).

Words decide only between names for the same: `filtered` where they are of a content policy, else `failed`.
"""

import email.utils
import random
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import openai

from cappy.records.instance import Status
from cappy.redaction import one_line
from cappy.sampling.endpoint.answers import SERVER_LOG_REMEDY, BadAnswerError
from cappy.sampling.endpoint.client import KEY_FILE_VARIABLE, KEY_VARIABLE
from cappy.untrusted import read_json

KNOBS: Mapping[str, float] = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0, "min_tokens": 0}
"""Parameters that change what is drawn, and the value of each that changes nothing."""
OPTIONAL = (
    *("n", "temperature", "top_p", "seed", "logprobs", "max_tokens", "max_completion_tokens"),
    *("top_k", "min_p", "min_tokens"),
)
"""What a request can do without."""
LENGTH = "max_tokens"
NEW_LENGTH = "max_completion_tokens"
_UNKNOWN = re.compile(
    r"unsupported|not support|n't support|unknown|unexpected|unrecogni[sz]ed|not (?:permitted|allowed)|extra|deprecated"
    rf"|{NEW_LENGTH}",
    re.IGNORECASE,
)


_OTHER_NAMES = {
    "logprobs": r"\blog[ _-]?prob",
    **{name: rf"\b{name.replace('_', '-?')}\b" for name in KNOBS if "_" in name},
}
"""How else servers name a parameter: topP, top-p, log probabilities."""


class NeededParameterError(Exception):
    """The model refuses parameters that a decoding cannot do without; `words` are the server's."""

    def __init__(self, values: Mapping[str, object], words: str) -> None:
        self.values = " with ".join(f"{name} {value:g}" for name, value in values.items())
        self.words = words
        super().__init__(self.values)


class Capabilities:
    """What the model behind an endpoint takes, learned from what it refuses; several threads may learn at once.

    A list of models would be out of date before it is read; a refusal costs nothing and is asked for once. What
    changes no distribution (`n`, `seed`, `logprobs`) is left out once it is refused. A parameter that does (`KNOBS`) is
    left out only where its value changes nothing, such as top_p 1: greedy decoding without its temperature 0 would be
    sampling. Of knobs that are refused together the neutral ones go; one that is refused by name and needed is asked
    for once more without the others, since some servers name only one of two that they do not take together.
    """

    def __init__(self) -> None:
        self._off: set[str] = set()
        self._refused_knobs: dict[frozenset[str], str] = {}
        self._refused_alone: set[str] = set()
        self._lock = threading.Lock()

    def supports(self, parameter: str) -> bool:
        """Whether it has not been refused."""
        return parameter not in self._off and frozenset([parameter]) not in self._refused_knobs

    def mark_unsupported(self, *parameters: str, words: str = "", sent: Mapping[str, object] | None = None) -> None:
        """Asks for it no more in this run; several knobs are refused together, and each alone may still be taken.

        `sent` is the body that was refused.
        """
        with self._lock:
            if all(name in KNOBS for name in parameters):
                if len(parameters) == 1 and not [
                    name for name in KNOBS if name in (sent or {}) and name not in parameters
                ]:
                    self._refused_alone.update(parameters)
                self._refused_knobs = {**self._refused_knobs, frozenset(parameters): words}
            else:
                self._off.update(parameters)

    def trim(self, body: Mapping[str, object]) -> tuple[dict[str, object], tuple[str, ...]]:
        """The body without what is refused, and the names of what is left out.

        The limit on length goes by its newer name where the older is refused, and then nothing is left out.
        NeededParameterError where what is refused decides what is drawn.
        """
        kept = dict(body)
        if LENGTH in kept and not self.supports(LENGTH):
            kept[NEW_LENGTH] = kept.pop(LENGTH)
        dropped = {name for name in kept if name in self._off} | self._dropped_knobs(kept)
        left_out = tuple(sorted(LENGTH if name == NEW_LENGTH else name for name in dropped))
        return {name: value for name, value in kept.items() if name not in dropped}, left_out

    def _dropped_knobs(self, body: Mapping[str, object]) -> set[str]:
        dropped: set[str] = set()
        # Those that are refused alone first: a pair of which one is gone is not a pair any more.
        for together, words in sorted(self._refused_knobs.items(), key=lambda rule: (len(rule[0]), sorted(rule[0]))):
            named = [name for name in KNOBS if name in together and name in body and name not in dropped]
            if len(named) < len(together):
                continue
            needed = [name for name in named if body[name] != KNOBS[name]]
            others = {name for name in KNOBS if name in body and name not in together and body[name] == KNOBS[name]}
            if needed and len(together) == 1 and others and not self._refused_alone.issuperset(together):
                dropped.update(others)
                continue
            if len(needed) > (len(together) > 1):
                raise NeededParameterError({name: body[name] for name in needed}, words)
            stays = needed or named[:1] if len(together) > 1 else []
            dropped.update(name for name in named if name not in stays)
        return dropped


def _refused_parameters(sent: Mapping[str, object], message: str, parameter: str | None) -> tuple[str, ...]:
    """The parameters that a refusal is about: one, or all knobs that it names; none if it names none that was sent."""
    refused = refused_parameter(sent, message, parameter)
    if refused not in KNOBS:
        return (refused,) if refused else ()
    return tuple(name for name in KNOBS if name in sent and (name == refused or _mentions(message, name)))


def refused_parameter(sent: Mapping[str, object], message: str, parameter: str | None) -> str | None:
    """The parameter that a refusal names, by its field or else in its text; None if it names none that was sent.

    A limit on length that is merely too high is not a refusal of the parameter: without it responses would cost more.
    """
    optional = [name for name in OPTIONAL if name in sent]
    named = parameter.split(".")[0] if parameter else None
    refused = named if named in optional else next((name for name in optional if _mentions(message, name)), None)
    if refused in (LENGTH, NEW_LENGTH) and not _UNKNOWN.search(message):
        return None
    return refused


def _mentions(message: str, name: str) -> bool:
    quoted = rf"['\"`]{name}['\"`]"
    # A lone letter is a parameter only in quotes or where something is said of its value.
    pattern = rf"{quoted}|\bn\s*(?:[=>!]|must|is|should|>)" if name == "n" else rf"\b{name}\b"
    other = _OTHER_NAMES.get(name)
    return bool(re.search(pattern, message) or (other and re.search(other, message, re.IGNORECASE)))


MAX_BACKOFF_SECONDS = 30.0
MAX_RETRY_AFTER_SECONDS = 600.0
_TOO_LONG = (
    *("context_length", "context length", "context window", "context size", "maximum context", "max_model_len"),
    *("maximum input length", "prompt is too long", "input is too long", "too many tokens", "token limit"),
)
_FILTERED = (
    *("content_filter", "content filter", "content_policy", "content policy", "content management policy"),
    *("responsibleai", "invalid_prompt", "usage policy", "usage policies", "policy violation", "moderation", "flagged"),
    *("safety system", "safety filter", "data_inspection", "prohibited content", "prohibited_content"),
)
_SPENT = ("insufficient_quota", "billing_hard_limit_reached")
_KEY = ("api key not valid", "api_key_invalid", "invalid api key", "invalid_api_key", "incorrect api key")
_PASSING = (408, 409, 425, 429)
_OF_ALL = (403, 404, 405, 410, 415)
"""About all requests where none was answered yet."""
REFUSALS_PER_PROBE = 20
"""Refusals in a row after which a plain question is asked."""
PROBE = "Answer with one word: yes."
"""The plain question: nothing in it can be refused for what it says or for its length."""
_MAX_ERROR_CHARACTERS = 2000
"""Characters of what an error says that are looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """`kind` says what follows: `again` after `wait` seconds (None: by backoff), `without` the parameters that were
    refused in the body `sent`, the instruction `unanswered` with a status, or the `end` of the run with its remedy.

    With `instruction_only` the words say that it is about this instruction alone. With `only_if_unanswered` the run ends only if the
    endpoint has answered nothing yet; else it is as `unanswered`.
    """

    kind: Literal["retry", "drop", "fail", "abort"]
    reason: str
    wait: float | None = None
    parameters: tuple[str, ...] = ()
    sent: Mapping[str, object] = field(default_factory=dict)
    status: Status = "failed"
    remedy: str = ""
    only_if_unanswered: bool = False
    instruction_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorBody:
    """What the body of an error says, each in one line without secrets; empty where it does not say it."""

    message: str = ""
    kind: str = ""
    param: str = ""
    code: str = ""


class RefusalCounter:
    """Counts answers and refusals, by which a refusal is found to be about one request or about all.

    Several threads may count at once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._refused = 0
        self._last_answer: float | None = None

    def note_answer(self) -> None:
        """A request was answered, now or in an earlier run."""
        with self._lock:
            self._refused = 0
            self._last_answer = time.monotonic()

    def note_refusal(self, *, instruction_only: bool) -> int:
        """A request was refused, in words that are of one instruction or not.

        How many were in a row where it is time to ask a plain question, else 0.
        """
        with self._lock:
            self._refused += 1
            first = self._refused == 1 and self._last_answer is None and not instruction_only
            return self._refused if first or self._refused % REFUSALS_PER_PROBE == 0 else 0

    @property
    def has_answered(self) -> bool:
        """Whether any request was answered."""
        return self._last_answer is not None

    def has_answered_since(self, moment: float) -> bool:
        """Whether a request was answered after this moment of `time.monotonic`."""
        last = self._last_answer
        return last is not None and last > moment


def read_error_body(body: bytes, keys: Sequence[str] = ()) -> ErrorBody:
    """The error object in a body, in the shapes that servers use; a body that is not JSON is the message.

    `keys` are secrets beside those that this process knows.
    """
    try:
        # Words for a person: half a character less of them is no loss.
        values = read_json(body.decode("utf-8", "replace").encode())
    except (ValueError, RecursionError):
        return ErrorBody(message=one_line(body.decode("utf-8", "replace"), _MAX_ERROR_CHARACTERS, *keys))
    return _parse_error_object(values.get("error", values) if isinstance(values, dict) else values, keys)


def _parse_error_object(inner: object, keys: Sequence[str] = ()) -> ErrorBody:
    """What an error object says; anything else is its own message."""
    if not isinstance(inner, dict):
        return ErrorBody(message=one_line(str(inner), _MAX_ERROR_CHARACTERS, *keys))
    message = inner.get("message") or inner.get("detail") or inner.get("error") or (inner if inner else "")

    def line(value: object) -> str:
        return "" if value is None else one_line(str(value), _MAX_ERROR_CHARACTERS, *keys)

    kind, param, code = (line(inner.get(name)) for name in ("type", "param", "code"))
    return ErrorBody(message=line(message), kind=kind, param=param, code=code)


def classify_error(error: Exception, sent: Mapping[str, object], headers: Mapping[str, str] | None = None) -> Fault:
    """What follows from what the client raised, or from an answer that was none, which came with these headers."""
    if isinstance(error, openai.APIStatusError):
        refusal = read_error_body(error.response.content)
        words = refusal.message or error.response.reason_phrase or "without a word"
        return _classify_status(error.status_code, refusal, words, sent, error.response.headers)
    if isinstance(error, openai.APIConnectionError):
        # The client's own text is "Connection error."; what it came from says why.
        reason = str(error.__cause__ or error) or type(error.__cause__ or error).__name__
        return Fault(kind="retry", reason=one_line(f"no answer ({reason})", _MAX_ERROR_CHARACTERS))
    if isinstance(error, BadAnswerError) and (status := embedded_status(error)):
        refusal = _parse_error_object(error.error_object)
        return _classify_status(status, refusal, refusal.message or "without a word", sent, headers or {})
    wait = retry_after(headers or {})
    fault = _transient_fault(one_line(str(error), _MAX_ERROR_CHARACTERS), wait)
    if not isinstance(error, BadAnswerError) or fault.remedy:
        return fault
    return replace(fault, remedy=SERVER_LOG_REMEDY if error.error_object is not None else error.remedy)


def embedded_status(error: BadAnswerError) -> int:
    """The status that the error object in a body with status 200 states as its code; 0 if it states none."""
    refusal = _parse_error_object(error.error_object) if error.error_object is not None else ErrorBody()
    code = refusal.code if re.fullmatch("[45][0-9]{2}", refusal.code) else ""
    return int(code) if code else 0


def read_embedded_error(error: BadAnswerError, keys: Sequence[str] = ()) -> ErrorBody:
    """The error object in a body with status 200, as `read_error_body` reads one."""
    return _parse_error_object(error.error_object, keys)


def backoff(attempt: int, first: float) -> float:
    """Seconds before attempt `attempt` (from 1): doubled each time, up to `MAX_BACKOFF_SECONDS`, less up to a quarter."""
    return float(min(first * 2.0 ** (attempt - 1), MAX_BACKOFF_SECONDS)) * (1 - 0.25 * random.random())


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


def _classify_status(
    status: int, refusal: ErrorBody, words: str, sent: Mapping[str, object], headers: Mapping[str, str]
) -> Fault:
    reason = f"{status} {words}"
    clue = f"{refusal.code} {refusal.kind} {words}".lower()

    def says(hints: Sequence[str]) -> bool:
        return any(hint in clue for hint in hints)

    if status < 400 or status > 599:
        return Fault(kind="abort", reason=reason, remedy="check the address in the spec")
    if status == 402 or (status == 429 and says(_SPENT)):
        return Fault(kind="abort", reason=reason, remedy="the account has nothing left; top it up")
    if status == 401 or (status == 400 and says(_KEY)):
        return Fault(kind="abort", reason=reason, remedy=_remedy(401))
    passing = status in _PASSING or (status >= 500 and status != 501)
    if status == 413 or (says(_TOO_LONG) and (status == 500 or not passing)):
        remedy = "shorten the instructions or lower --max-new-tokens"
        return Fault(kind="fail", reason=reason, remedy=remedy, instruction_only=True)
    if passing:
        busy = "ask less at a time: --concurrency, --requests-per-minute" if status == 429 else SERVER_LOG_REMEDY
        return _transient_fault(reason, retry_after(headers), busy)
    if says(_FILTERED) and refusal.param not in sent:
        return Fault(kind="fail", reason=reason, status="filtered", instruction_only=True)
    if parameters := _refused_parameters(sent, words, refusal.param):
        return Fault(kind="drop", reason=reason, parameters=parameters, sent=sent)
    if status in _OF_ALL:
        return Fault(kind="abort", reason=reason, remedy=_remedy(status), only_if_unanswered=True)
    return Fault(kind="fail", reason=reason, remedy=_remedy(status))


def _remedy(status: int) -> str:
    """What a person can do about a refusal of all requests."""
    if status in (401, 403):
        return f"set {KEY_VARIABLE}, or {KEY_FILE_VARIABLE} for a mounted file"
    if status in _OF_ALL:
        return "check the model's name and the address in the spec"
    return "check what the endpoint takes"


def _transient_fault(reason: str, wait: float | None, remedy: str = "") -> Fault:
    if wait is not None and wait > MAX_RETRY_AFTER_SECONDS:
        return Fault(kind="abort", reason=reason, remedy=f"it asks to wait {wait:,.0f} s; come back then")
    return Fault(kind="retry", reason=reason, wait=wait, remedy=remedy)
