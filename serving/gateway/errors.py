"""Errors of the gateway as OpenAI's error object with a status, and masking of keys in what is passed on."""

import base64
import contextlib
import re
from collections.abc import Mapping, Sequence

import httpx2

from cappy.redaction import MIN_SECRET_LENGTH, one_line, redact
from cappy.sampling.endpoint.answers import NotACompletionError
from cappy.sampling.endpoint.client import UnreadableResponseError
from cappy.sampling.endpoint.faults import embedded_status, read_embedded_error, read_error_body
from cappy.untrusted import to_utf8

INVALID_REQUEST = "invalid_request_error"
_NUMBER = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,6})?")
_DATE = re.compile(r"[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT")
_FORWARDED_HEADERS = {
    "retry-after": re.compile(f"{_NUMBER.pattern}|{_DATE.pattern}"),
    "retry-after-ms": _NUMBER,
    "x-should-retry": re.compile("true|false"),
}
"""Headers of the LLM's server that are passed on, and their valid values."""
_MAX_MESSAGE_CHARACTERS = 500


class GatewayError(Exception):
    """A failed request: status, OpenAI's `{"error": {message, type, param, code}}`, and headers.

    `may_be_billed` says that the LLM may have generated tokens, so that they must be counted as spent.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        may_be_billed: bool = False,
    ) -> None:
        message = redact(message)
        super().__init__(message)
        self.status = status
        self.error = {"message": message, "type": kind, "param": param, "code": code}
        self.headers = dict(headers or {})
        self.may_be_billed = may_be_billed

    def body(self) -> dict[str, object]:
        """The body of the response."""
        return {"error": self.error}


def refusal_error(name: str, response: httpx2.Response, keys: Sequence[str]) -> GatewayError:
    """The error for an error response of an LLM's server: its status and message, from which keys are removed.

    `name` is the server's name in the message. A redirect, or any other status that is not an error, becomes 502.
    """
    status = response.status_code
    if not 400 <= status <= 599:
        return GatewayError(502, f"{name} answered {status}; check its address", kind="upstream_error")
    refusal = read_error_body(response.content, keys)
    message = _shorten(refusal.message) or f"status {status} without a message"
    note = " (that server needs another key, not this gateway)" if status == 401 else ""
    return GatewayError(
        status,
        f"{name} answered {status}: {message}{note}",
        kind=_shorten(refusal.kind) or ("upstream_error" if status >= 500 else INVALID_REQUEST),
        param=_shorten(refusal.param) or None,
        code=_shorten(refusal.code) or None,
        headers=_select_headers(response.headers),
    )


def answer_error(name: str, error: NotACompletionError, keys: Sequence[str]) -> GatewayError:
    """The error for a response with status 200 and no candidate: the error in its body, otherwise 502."""
    status = embedded_status(error)
    if status:
        refusal = read_embedded_error(error, keys)
        message = _shorten(refusal.message) or f"status {status} without a message"
        kind = _shorten(refusal.kind) or ("upstream_error" if status >= 500 else INVALID_REQUEST)
        return GatewayError(status, f"{name} answered {status}: {message}", kind=kind, may_be_billed=True)
    text = f"{name} did not answer with a completion: {error.text(keys)}"
    return GatewayError(502, text, kind="upstream_error", code="upstream_bad_answer", may_be_billed=True)


def utf8_error(name: str) -> GatewayError:
    """The error for a list of models that cannot be decoded."""
    text = f"{name} did not answer with UTF-8; it must send UTF-8 or declare its charset"
    return GatewayError(502, text, kind="upstream_error", code="upstream_bad_answer")


def network_error(name: str, error: httpx2.HTTPError, seconds: float, keys: Sequence[str]) -> GatewayError:
    """The error for a failed call.

    504 on a timeout, 503 if all connections are in use, 400 for an invalid Authorization header, otherwise 502.
    """
    if isinstance(error, httpx2.PoolTimeout):
        text = f"all connections to {name} are in use; try again"
        return GatewayError(503, text, kind="overloaded", code="overloaded", headers={"retry-after": "1"})
    if isinstance(error, httpx2.LocalProtocolError):
        return GatewayError(400, "the Authorization header has invalid characters; send only the key")
    if isinstance(error, UnreadableResponseError):
        return GatewayError(
            502, f"{name}: {error}", kind="upstream_error", code="upstream_bad_answer", may_be_billed=True
        )
    was_sent = not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
    if isinstance(error, httpx2.TimeoutException):
        return timeout_error(name, seconds) if was_sent else _connect_timeout_error(name)
    reason = one_line(str(error), _MAX_MESSAGE_CHARACTERS, *keys) or type(error).__name__
    text = f"{name} cannot be reached ({reason})" if not was_sent else f"{name} ended its response early ({reason})"
    return GatewayError(
        502, f"{text}; check that it runs", kind="upstream_error", code="upstream_unreachable", may_be_billed=was_sent
    )


def timeout_error(name: str, seconds: float) -> GatewayError:
    """The error for a response that was not complete in time."""
    text = f"{name} did not answer within {seconds:g} s; try again, or raise --max-seconds"
    return GatewayError(504, text, kind="timeout", code="timeout", may_be_billed=True)


def _connect_timeout_error(name: str) -> GatewayError:
    text = f"connecting to {name} took too long; try again, or raise --max-seconds"
    return GatewayError(504, text, kind="timeout", code="timeout")


def _select_headers(headers: Mapping[str, str]) -> dict[str, str]:
    values = {name: headers.get(name, "") for name in _FORWARDED_HEADERS}
    return {name: value for name, value in values.items() if _FORWARDED_HEADERS[name].fullmatch(value)}


def _shorten(text: str) -> str:
    """Truncates a text from which secrets have been removed."""
    return text[:_MAX_MESSAGE_CHARACTERS]


def secrets_of(authorization: str) -> tuple[str, ...]:
    """The secret parts of the header, which must not appear in any text."""
    scheme, _, key = authorization.strip().partition(" ")
    secrets = [key.strip() or scheme]
    if scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            secrets.append(base64.b64decode(key).decode("utf-8", "replace").partition(":")[2])
    return tuple(secrets)


def body_as_utf8(response: httpx2.Response) -> bytes:
    """The body converted to UTF-8 if possible, otherwise unchanged."""
    return to_utf8(response.content, response.headers.get("content-type", ""))


def mask_key(body: bytes, authorization: str) -> bytes:
    """Masks the key in a body, in case the server repeats it."""
    for key in secrets_of(authorization):
        if len(key) >= MIN_SECRET_LENGTH:
            body = body.replace(key.encode("latin-1", "replace"), b"***")
    return body
