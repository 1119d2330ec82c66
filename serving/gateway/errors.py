"""What goes back where no answer can: OpenAI's error object under a status."""

from collections.abc import Mapping
from typing import Any

import httpx2

from cappy.sampling.endpoint.keys import without

INVALID = "invalid_request_error"
_KEPT = ("retry-after", "retry-after-ms", "x-should-retry")
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
        super().__init__(message)
        self.status = status
        self.error = {"message": message, "type": kind, "param": param, "code": code}
        self.headers = dict(headers or {})
        self.paid = paid

    def body(self) -> dict[str, Any]:
        """The body of the response."""
        return {"error": self.error}


def refused(name: str, response: httpx2.Response, key: str) -> GatewayError:
    """What an LLM's server refused, under its status and with its own words, the key taken out of them.

    `name` says whose refusal it is. A redirect is none that a client could follow: 502.
    """
    status = response.status_code
    if status < 400:
        return GatewayError(502, f"{name} answered {status}; check its address", kind="upstream_error")
    told = _told(response)
    message = without(key, str(told.get("message") or f"status {status} without a word"))[:_SHOWN]
    whose = " (it is that server which wants another key, not this gateway)" if status == 401 else ""
    kind, param, code = (_text(told.get(field), key) for field in ("type", "param", "code"))
    return GatewayError(
        status,
        f"{name} answered {status}: {message}{whose}",
        kind=kind or ("upstream_error" if status >= 500 else INVALID),
        param=param,
        code=code,
        headers={field: response.headers[field] for field in _KEPT if field in response.headers},
    )


def unreachable(name: str, error: httpx2.HTTPError, seconds: float) -> GatewayError:
    """What the network made of a request: 504 where time ran out, else 502."""
    sent = not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
    if isinstance(error, httpx2.TimeoutException):
        text = f"{name} did not answer within {seconds:g} s" if sent else f"{name} could not be connected to in time"
        return GatewayError(
            504, f"{text}; try again, or raise --max-seconds", kind="timeout", code="timeout", paid=sent
        )
    why = str(error) or type(error).__name__
    text = f"{name} cannot be reached ({why})" if not sent else f"{name} broke off its answer ({why})"
    return GatewayError(
        502, f"{text}; check that it runs", kind="upstream_error", code="upstream_unreachable", paid=sent
    )


def _told(response: httpx2.Response) -> Mapping[str, Any]:
    """The error object in a body, in the shapes that servers use."""
    try:
        values = response.json()
    except (ValueError, RecursionError):
        return {"message": response.text[:_SHOWN]}
    if not isinstance(values, dict):
        return {"message": str(values)[:_SHOWN]}
    inner = values.get("error", values)
    if isinstance(inner, dict):
        return {**inner, "message": inner.get("message") or inner.get("detail")}
    return {"message": inner}


def _text(value: object, key: str) -> str | None:
    return None if value is None else without(key, str(value))[:_SHOWN]
