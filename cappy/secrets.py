"""Secrets that a step reads itself, where the platform cannot put them into its environment: Google's Secret Manager.

CAPPY_SECRETS holds, as JSON, which secret each variable comes from. The values go into this process's environment and
nowhere else.
"""

import base64
import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from cappy.errors import ConfigError, quote
from cappy.redaction import one_line, remember

if TYPE_CHECKING:
    from requests import Session

VARIABLE = "CAPPY_SECRETS"
ADDRESS = "https://secretmanager.googleapis.com"
MAX_BYTES = 1_000_000
"""Of an answer; a secret has 64 KiB at most."""


def fill_environment(address: str = ADDRESS) -> None:
    """Reads every secret that CAPPY_SECRETS names; ConfigError with the remedy where one cannot be had."""
    text = os.environ.pop(VARIABLE, "")
    if not text:
        return
    try:
        wanted: dict[str, str] = json.loads(text)
        if not isinstance(wanted, dict) or not all(isinstance(name, str) for name in wanted.values()):
            raise ValueError(f"got {quote(wanted)}")
    except ValueError as error:
        raise ConfigError(
            f"{VARIABLE}: is not a JSON object of variables and secrets; compile the pipeline again"
        ) from error
    session = _session()
    for variable, name in wanted.items():
        os.environ[variable] = value = _read(session, address, name)
        remember(value)


def _read(session: "Session", address: str, name: str) -> str:
    from google.auth.exceptions import GoogleAuthError
    from requests.exceptions import RequestException

    try:
        # The token of the service account goes to this address alone, and of the answer so much is read.
        with session.get(f"{address}/v1/{name}:access", timeout=30, allow_redirects=False, stream=True) as answer:
            status = answer.status_code
            body = next(answer.iter_content(MAX_BYTES), b"")
    except (RequestException, GoogleAuthError) as error:
        reason = one_line(str(error), 120)
        remedy = "look at the step's network and service account, then run it again"
        raise ConfigError(f"secret {quote(name)}: Secret Manager gave no answer ({reason}); {remedy}") from error
    if status != 200:
        remedy = "grant the service account roles/secretmanager.secretAccessor on it, or mend its name in the recipe"
        raise ConfigError(f"secret {quote(name)}: Secret Manager answered {status}; {remedy}")
    try:
        return base64.b64decode(json.loads(body)["payload"]["data"]).decode()
    except (ValueError, KeyError, TypeError, RecursionError):
        # Without the cause: it may hold the secret.
        remedy = "look at the secret's newest version, then run the step again"
        raise ConfigError(f"secret {quote(name)}: Secret Manager's answer holds no text; {remedy}") from None


def _session() -> "Session":
    try:
        import google.auth
        from google.auth.exceptions import GoogleAuthError
        from google.auth.transport.requests import AuthorizedSession
    except ModuleNotFoundError as missing:
        raise ConfigError(
            f"secrets: need {missing.name}; use the project's images, or pip install 'cappy-scorer[gcp]'"
        ) from missing
    try:
        credentials, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
    except GoogleAuthError as error:
        remedy = "run the step with a service account"
        raise ConfigError(f"secrets: no Google credentials here ({error}); {remedy}") from error
    session: Callable[..., Session] = AuthorizedSession  # which has no types
    return session(credentials)
