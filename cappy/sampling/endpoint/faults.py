"""Classifies failed requests: retry, change the request, fail its candidates, or abort the run.

A refusal may concern one request or all of them. Error messages vary too much to decide by them, so the status and the
outcome of other requests decide:

- 401, 402, 3xx and an account without credit: all requests; the run is aborted.
- 403, 404, 405, 410, 415: all requests, unless the endpoint has answered in this run; then only this one.
- 400, 413, 422 and other statuses: only this request, whose candidates are `failed`. The same holds for a request
  that runs out of retries while other requests, or a probe, are answered.
- A probe (a harmless instruction) is sent after the first refusal of a run, unless its message concerns the
  instruction, and after every `REFUSALS_PER_PROBE` refusals in a row. If it is refused too, the run is aborted.
- `--max-failed` limits the share of failed candidates (`cappy.sampling.statistics`).

Messages decide between the statuses `filtered` (content policy) and `failed`, and separate a refusal of one instruction
(too long) or of one parameter from one that ends the run (no credit, an invalid key).
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
from cappy.sampling.endpoint.address import KEY_FILE_VARIABLE, KEY_VARIABLE
from cappy.sampling.endpoint.answers import SERVER_LOG_REMEDY, NotACompletionError
from cappy.untrusted import read_json

SAMPLING_PARAMETERS: Mapping[str, float] = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0, "min_tokens": 0}
"""Parameters that change the distribution of samples, with their neutral values."""
OPTIONAL_PARAMETERS = (
    *("n", "temperature", "top_p", "seed", "logprobs", "max_tokens", "max_completion_tokens"),
    *("top_k", "min_p", "min_tokens"),
)
"""Parameters that a request can omit."""
MAX_TOKENS = "max_tokens"
MAX_COMPLETION_TOKENS = "max_completion_tokens"
_UNSUPPORTED_PATTERN = re.compile(
    r"unsupported|not support|n't support|unknown|unexpected|unrecogni[sz]ed|not (?:permitted|allowed)|extra|deprecated"
    rf"|{MAX_COMPLETION_TOKENS}",
    re.IGNORECASE,
)


_OTHER_NAMES = {
    "logprobs": r"\blog[ _-]?prob",
    **{name: rf"\b{name.replace('_', '-?')}\b" for name in SAMPLING_PARAMETERS if "_" in name},
}
"""Other spellings of parameters in error messages: topP, top-p, log probabilities."""


class NeededParameterError(Exception):
    """The model refuses parameters that the decoding needs; `message` is the server's."""

    def __init__(self, values: Mapping[str, object], message: str) -> None:
        self.values = " with ".join(f"{name} {value:g}" for name, value in values.items())
        self.message = message
        super().__init__(self.values)


class Capabilities:
    """The request parameters that a model supports, learned from its refusals; thread-safe.

    A fixed list of models would soon be out of date, and a refusal is free. Refused parameters that do not change the
    distribution (`n`, `seed`, `logprobs`) are omitted. Those that do (`SAMPLING_PARAMETERS`) are omitted only at their
    neutral value, such as top_p 1: greedy decoding without temperature 0 would be sampling. If parameters
    are refused together, the neutral ones are omitted. A parameter that is needed but refused is sent once more without
    the neutral others, because some servers name only one of two parameters that they do not accept together.
    """

    def __init__(self) -> None:
        self._unsupported: set[str] = set()
        self._refused_together: dict[frozenset[str], str] = {}
        self._refused_alone: set[str] = set()
        self._lock = threading.Lock()

    def supports(self, parameter: str) -> bool:
        """Whether the parameter has not been refused."""
        return parameter not in self._unsupported and frozenset([parameter]) not in self._refused_together

    def mark_unsupported(self, *parameters: str, message: str = "", sent: Mapping[str, object] | None = None) -> None:
        """Records a refusal; sampling parameters that are refused together may still be supported one by one.

        `sent` is the refused body.
        """
        with self._lock:
            if all(name in SAMPLING_PARAMETERS for name in parameters):
                if len(parameters) == 1 and not [
                    name for name in SAMPLING_PARAMETERS if name in (sent or {}) and name not in parameters
                ]:
                    self._refused_alone.update(parameters)
                self._refused_together = {**self._refused_together, frozenset(parameters): message}
            else:
                self._unsupported.update(parameters)

    def trim(self, body: Mapping[str, object]) -> tuple[dict[str, object], tuple[str, ...]]:
        """The body without refused parameters, and the names of the omitted ones.

        A refused `max_tokens` is renamed to `max_completion_tokens`, which does not count as omitted. Raises
        NeededParameterError if a refused parameter is needed.
        """
        remaining = dict(body)
        if MAX_TOKENS in remaining and not self.supports(MAX_TOKENS):
            remaining[MAX_COMPLETION_TOKENS] = remaining.pop(MAX_TOKENS)
        dropped = {name for name in remaining if name in self._unsupported} | self._dropped_parameters(remaining)
        left_out = tuple(sorted(MAX_TOKENS if name == MAX_COMPLETION_TOKENS else name for name in dropped))
        return {name: value for name, value in remaining.items() if name not in dropped}, left_out

    def _dropped_parameters(self, body: Mapping[str, object]) -> set[str]:
        dropped: set[str] = set()
        # Single parameters first: without one of its members a refused group no longer applies.
        for refused, message in sorted(
            self._refused_together.items(), key=lambda rule: (len(rule[0]), sorted(rule[0]))
        ):
            present = [name for name in SAMPLING_PARAMETERS if name in refused and name in body and name not in dropped]
            if len(present) < len(refused):
                continue
            needed = [name for name in present if body[name] != SAMPLING_PARAMETERS[name]]
            others = {
                name
                for name, neutral in SAMPLING_PARAMETERS.items()
                if name in body and name not in refused and body[name] == neutral
            }
            if needed and len(refused) == 1 and others and not self._refused_alone.issuperset(refused):
                dropped.update(others)
                continue
            if len(needed) > (len(refused) > 1):
                raise NeededParameterError({name: body[name] for name in needed}, message)
            kept = needed or present[:1] if len(refused) > 1 else []
            dropped.update(name for name in present if name not in kept)
        return dropped


def _refused_parameters(sent: Mapping[str, object], message: str, parameter: str | None) -> tuple[str, ...]:
    """The sent parameters that a refusal names: one, or all sampling parameters in its message; may be empty."""
    refused = refused_parameter(sent, message, parameter)
    if refused not in SAMPLING_PARAMETERS:
        return (refused,) if refused else ()
    return tuple(name for name in SAMPLING_PARAMETERS if name in sent and (name == refused or _mentions(message, name)))


def refused_parameter(sent: Mapping[str, object], message: str, parameter: str | None) -> str | None:
    """The sent parameter that a refusal names, in its `param` field or its message; None if it names none.

    A `max_tokens` that is only too high does not count, because without it responses would cost more.
    """
    optional = [name for name in OPTIONAL_PARAMETERS if name in sent]
    parameter_name = parameter.split(".")[0] if parameter else None
    refused = (
        parameter_name
        if parameter_name in optional
        else next((name for name in optional if _mentions(message, name)), None)
    )
    if refused in (MAX_TOKENS, MAX_COMPLETION_TOKENS) and not _UNSUPPORTED_PATTERN.search(message):
        return None
    return refused


def may_refuse_field(status: int) -> bool:
    """Whether a refusal with this status may be about a field, and not about key, budget, size or the moment."""
    return 400 <= status < 500 and status not in (401, 402, 413, *_TRANSIENT_STATUSES)


def _mentions(message: str, name: str) -> bool:
    quoted_pattern = rf"['\"`]{name}['\"`]"
    # The letter n is only a parameter in quotes or before a statement about its value.
    pattern = rf"{quoted_pattern}|\bn\s*(?:[=>!]|must|is|should|>)" if name == "n" else rf"\b{name}\b"
    other_pattern = _OTHER_NAMES.get(name)
    return bool(re.search(pattern, message) or (other_pattern and re.search(other_pattern, message, re.IGNORECASE)))


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
_NO_CREDIT = ("insufficient_quota", "billing_hard_limit_reached")
_BAD_KEY = ("api key not valid", "api_key_invalid", "invalid api key", "invalid_api_key", "incorrect api key")
_TRANSIENT_STATUSES = (408, 409, 425, 429)
_CONFIGURATION_STATUSES = (403, 404, 405, 410, 415)
"""Statuses that concern all requests if none was answered yet."""
REFUSALS_PER_PROBE = 20
"""A probe is sent after this number of refusals in a row."""
PROBE = "Answer with one word: yes."
"""The instruction of a probe: no server should refuse its content or its length."""
_MAX_ERROR_CHARACTERS = 2000
"""Maximum characters of an error message that are read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A failed request and what to do about it, by `kind`.

    `retry` waits `wait` seconds (None: exponential backoff). `drop` omits the `parameters` that were refused in the
    body `sent`. `fail` gives the candidates a `status`. `abort` ends the run with a `remedy`; if `only_if_unanswered`,
    it does so only before the endpoint's first answer, and is like `fail` afterwards. `instruction_only` means that the
    message concerns this instruction only.
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
    """The fields of an error body, each as one line without secrets; empty if missing."""

    message: str = ""
    kind: str = ""
    param: str = ""
    code: str = ""


class RefusalCounter:
    """Counts answers and refusals, to decide whether a refusal concerns one request or all; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._refused = 0
        self._last_answer: float | None = None

    def note_answer(self) -> None:
        """Records that a request was answered, now or in an earlier run."""
        with self._lock:
            self._refused = 0
            self._last_answer = time.monotonic()

    def note_refusal(self, *, instruction_only: bool) -> int:
        """Records a refusal; returns the number of refusals in a row if a probe is due, else 0."""
        with self._lock:
            self._refused += 1
            first = self._refused == 1 and self._last_answer is None and not instruction_only
            return self._refused if first or self._refused % REFUSALS_PER_PROBE == 0 else 0

    @property
    def has_answered(self) -> bool:
        """Whether any request was answered."""
        return self._last_answer is not None

    def has_answered_since(self, moment: float) -> bool:
        """Whether a request was answered after this time of `time.monotonic`."""
        last_answer = self._last_answer
        return last_answer is not None and last_answer > moment


def read_error_body(body: bytes, keys: Sequence[str] = ()) -> ErrorBody:
    """Parses the error object in a body, in the formats that servers use; a body that is not JSON is the message.

    `keys` are secrets to remove, in addition to those that this process knows.
    """
    try:
        # For display only, so invalid UTF-8 is replaced.
        values = read_json(body.decode("utf-8", "replace").encode())
    except (ValueError, RecursionError):
        return ErrorBody(message=one_line(body.decode("utf-8", "replace"), _MAX_ERROR_CHARACTERS, *keys))
    return _parse_error_object(values.get("error", values) if isinstance(values, dict) else values, keys)


def _parse_error_object(error_object: object, keys: Sequence[str] = ()) -> ErrorBody:
    """Parses an error object; anything else becomes the message."""
    if not isinstance(error_object, dict):
        return ErrorBody(message=one_line(str(error_object), _MAX_ERROR_CHARACTERS, *keys))
    message = (
        error_object.get("message")
        or error_object.get("detail")
        or error_object.get("error")
        or (error_object if error_object else "")
    )

    def line(value: object) -> str:
        return "" if value is None else one_line(str(value), _MAX_ERROR_CHARACTERS, *keys)

    kind, param, code = (line(error_object.get(name)) for name in ("type", "param", "code"))
    return ErrorBody(message=line(message), kind=kind, param=param, code=code)


def classify_error(error: Exception, sent: Mapping[str, object], headers: Mapping[str, str] | None = None) -> Fault:
    """Classifies an error of the client, or a NotACompletionError of an answer with these headers."""
    if isinstance(error, openai.APIStatusError):
        error_body = read_error_body(error.response.content)
        message = error_body.message or error.response.reason_phrase or "without a message"
        return _classify_status(error.status_code, error_body, message, sent, error.response.headers)
    if isinstance(error, openai.APIConnectionError):
        # The message is only "Connection error."; the cause has the reason.
        reason = str(error.__cause__ or error) or type(error.__cause__ or error).__name__
        return Fault(kind="retry", reason=one_line(f"no answer ({reason})", _MAX_ERROR_CHARACTERS))
    if isinstance(error, NotACompletionError) and (status := embedded_status(error)):
        error_body = _parse_error_object(error.error_object)
        return _classify_status(status, error_body, error_body.message or "without a message", sent, headers or {})
    wait = retry_after(headers or {})
    fault = _transient_fault(one_line(str(error), _MAX_ERROR_CHARACTERS), wait)
    if not isinstance(error, NotACompletionError) or fault.remedy:
        return fault
    return replace(fault, remedy=SERVER_LOG_REMEDY if error.error_object is not None else error.remedy)


def embedded_status(error: NotACompletionError) -> int:
    """The status in the `code` of the error object of a body with status 200; 0 if there is none."""
    error_body = _parse_error_object(error.error_object) if error.error_object is not None else ErrorBody()
    code = error_body.code if re.fullmatch("[45][0-9]{2}", error_body.code) else ""
    return int(code) if code else 0


def read_embedded_error(error: NotACompletionError, keys: Sequence[str] = ()) -> ErrorBody:
    """The error object in a body with status 200, as `read_error_body` reads one."""
    return _parse_error_object(error.error_object, keys)


def backoff(attempt: int, first: float) -> float:
    """Seconds to wait before retry `attempt` (from 1): doubled up to `MAX_BACKOFF_SECONDS`, minus up to a quarter."""
    return float(min(first * 2.0 ** (attempt - 1), MAX_BACKOFF_SECONDS)) * (1 - 0.25 * random.random())


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait by the Retry-After header (a number or a date); None without a valid one."""
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
        return None


def _classify_status(
    status: int, error_body: ErrorBody, message: str, sent: Mapping[str, object], headers: Mapping[str, str]
) -> Fault:
    reason = f"{status} {message}"
    searchable = f"{error_body.code} {error_body.kind} {message}".lower()

    def mentions_any(hints: Sequence[str]) -> bool:
        return any(hint in searchable for hint in hints)

    if status < 400 or status > 599:
        return Fault(kind="abort", reason=reason, remedy="check the address in the spec")
    if status == 402 or (status == 429 and mentions_any(_NO_CREDIT)):
        return Fault(kind="abort", reason=reason, remedy="the account has no credit left; top it up")
    if status == 401 or (status == 400 and mentions_any(_BAD_KEY)):
        return Fault(kind="abort", reason=reason, remedy=_remedy(401))
    transient = status in _TRANSIENT_STATUSES or (status >= 500 and status != 501)
    if status == 413 or (mentions_any(_TOO_LONG) and (status == 500 or not transient)):
        remedy = "shorten the instructions or lower --max-new-tokens"
        return Fault(kind="fail", reason=reason, remedy=remedy, instruction_only=True)
    if transient:
        remedy = "lower --concurrency or set --requests-per-minute" if status == 429 else SERVER_LOG_REMEDY
        return _transient_fault(reason, retry_after(headers), remedy)
    if mentions_any(_FILTERED) and error_body.param not in sent:
        return Fault(kind="fail", reason=reason, status="filtered", instruction_only=True)
    if parameters := _refused_parameters(sent, message, error_body.param):
        return Fault(kind="drop", reason=reason, parameters=parameters, sent=sent)
    if status in _CONFIGURATION_STATUSES:
        return Fault(kind="abort", reason=reason, remedy=_remedy(status), only_if_unanswered=True)
    return Fault(kind="fail", reason=reason, remedy=_remedy(status))


def _remedy(status: int) -> str:
    """The remedy for a refusal of all requests."""
    if status in (401, 403):
        return f"set {KEY_VARIABLE}, or {KEY_FILE_VARIABLE} for a mounted file"
    if status in _CONFIGURATION_STATUSES:
        return "check the model's name and the address in the spec"
    return "check what the endpoint supports"


def _transient_fault(reason: str, wait: float | None, remedy: str = "") -> Fault:
    if wait is not None and wait > MAX_RETRY_AFTER_SECONDS:
        return Fault(kind="abort", reason=reason, remedy=f"the server asks to wait {wait:,.0f} s; wait that long")
    return Fault(kind="retry", reason=reason, wait=wait, remedy=remedy)
