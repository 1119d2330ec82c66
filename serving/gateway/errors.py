"""What goes back where no answer can: OpenAI's error object under a status."""

import re
from collections.abc import Mapping, Sequence

import httpx2

from cappy.redaction import one_line, redact
from cappy.sampling.endpoint.answers import BadAnswerError
from cappy.sampling.endpoint.client import RefusedAnswerError
from cappy.sampling.endpoint.faults import embedded_status, read_embedded_error, read_error_body

INVALID = "invalid_request_error"
_NUMBER = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,6})?")
_DATE = re.compile(r"[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT")
_KEPT = {
    "retry-after": re.compile(f"{_NUMBER.pattern}|{_DATE.pattern}"),
    "retry-after-ms": _NUMBER,
    "x-should-retry": re.compile("true|false"),
}
"""Headers that are passed on, and what they must be."""
_SHOWN = 500


class GatewayError(Exception):
    """An answer that could not be had: status, OpenAI's `{"error": {message, type, param, code}}`, and headers.

    `paid` says whether the LLM may have worked all the same, so that its tokens must be taken for spent.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        paid: bool = False,
    ) -> None:
        message = redact(message)
        super().__init__(message)
        self.status = status
        self.error = {"message": message, "type": kind, "param": param, "code": code}
        self.headers = dict(headers or {})
        self.paid = paid

    def body(self) -> dict[str, object]:
        """The body of the response."""
        return {"error": self.error}


def refusal_error(name: str, response: httpx2.Response, keys: Sequence[str]) -> GatewayError:
    """What an LLM's server refused, under its status and with its own words, the keys taken out of them.

    `name` says whose refusal it is. A redirect, or any status that is not an error, is 502.
    """
    status = response.status_code
    if not 400 <= status <= 599:
        return GatewayError(502, f"{name} answered {status}; check its address", kind="upstream_error")
    refusal = read_error_body(response.content, keys)
    message = _shorten(refusal.message) or f"status {status} without a word"
    whose = " (it is that server which wants another key, not this gateway)" if status == 401 else ""
    return GatewayError(
        status,
        f"{name} answered {status}: {message}{whose}",
        kind=_shorten(refusal.kind) or ("upstream_error" if status >= 500 else INVALID),
        param=_shorten(refusal.param) or None,
        code=_shorten(refusal.code) or None,
        headers=_keep_headers(response.headers),
    )


def bad_answer(name: str, error: BadAnswerError, keys: Sequence[str]) -> GatewayError:
    """An answer with status 200 that holds no candidate: the error that it states, else 502."""
    status = embedded_status(error)
    if status:
        refusal = read_embedded_error(error, keys)
        message = _shorten(refusal.message) or f"status {status} without a word"
        kind = _shorten(refusal.kind) or ("upstream_error" if status >= 500 else INVALID)
        return GatewayError(status, f"{name} answered {status}: {message}", kind=kind, paid=True)
    what = f"{name} answered what is not a completion: {error.text(keys)}"
    return GatewayError(502, what, kind="upstream_error", code="upstream_bad_answer", paid=True)


def not_utf8(name: str) -> GatewayError:
    """A list of models whose text cannot be read."""
    what = f"{name} answered what is not UTF-8; it must send UTF-8, or name the charset that it sends"
    return GatewayError(502, what, kind="upstream_error", code="upstream_bad_answer")


def unreachable(name: str, error: httpx2.HTTPError, seconds: float, keys: Sequence[str]) -> GatewayError:
    """What the network made of a request: 504 where time ran out, 503 where too many are under way, else 502."""
    if isinstance(error, httpx2.PoolTimeout):
        text = f"as many requests as may be are under way at {name}; try again"
        return GatewayError(503, text, kind="overloaded", code="overloaded", headers={"retry-after": "1"})
    if isinstance(error, httpx2.LocalProtocolError):
        return GatewayError(400, "the Authorization header holds what no header may; send the key alone")
    if isinstance(error, RefusedAnswerError):
        return GatewayError(502, f"{name}: {error}", kind="upstream_error", code="upstream_bad_answer", paid=True)
    sent = not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
    if isinstance(error, httpx2.TimeoutException):
        return late(name, seconds) if sent else _connection_error(name)
    why = one_line(str(error), _SHOWN, *keys) or type(error).__name__
    text = f"{name} cannot be reached ({why})" if not sent else f"{name} broke off its answer ({why})"
    return GatewayError(
        502, f"{text}; check that it runs", kind="upstream_error", code="upstream_unreachable", paid=sent
    )


def late(name: str, seconds: float) -> GatewayError:
    """An answer that was not there in time, however little of it was."""
    text = f"{name} did not answer within {seconds:g} s; try again, or raise --max-seconds"
    return GatewayError(504, text, kind="timeout", code="timeout", paid=True)


def _connection_error(name: str) -> GatewayError:
    text = f"{name} could not be connected to in time; try again, or raise --max-seconds"
    return GatewayError(504, text, kind="timeout", code="timeout")


def _keep_headers(headers: Mapping[str, str]) -> dict[str, str]:
    values = {name: headers.get(name, "") for name in _KEPT}
    return {name: value for name, value in values.items() if _KEPT[name].fullmatch(value)}


def _shorten(text: str) -> str:
    """The beginning of a text that holds no secret any more."""
    return text[:_SHOWN]
