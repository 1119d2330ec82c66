"""Secrets that a step reads itself, where the platform cannot put them into its environment: Google's Secret Manager.

CAPPY_SECRETS holds, as JSON, which secret each variable comes from. The values go into this process's environment and
nowhere else.
"""

import base64
import json
import os
from typing import Any

from cappy.errors import ConfigError, shown

VARIABLE = "CAPPY_SECRETS"
ADDRESS = "https://secretmanager.googleapis.com"


def fill_environment(address: str = ADDRESS) -> None:
    """Reads every secret that CAPPY_SECRETS names; ConfigError with the remedy where one cannot be had."""
    text = os.environ.pop(VARIABLE, "")
    if not text:
        return
    try:
        wanted: dict[str, str] = json.loads(text)
    except ValueError as error:
        raise ConfigError(
            f"{VARIABLE}: is no JSON object of variables and secrets; compile the pipeline again"
        ) from error
    session = _session()
    for variable, name in wanted.items():
        os.environ[variable] = _read(session, address, name)


def _read(session: Any, address: str, name: str) -> str:
    from google.auth.exceptions import GoogleAuthError
    from requests.exceptions import RequestException

    try:
        answer = session.get(f"{address}/v1/{name}:access", timeout=30)
    except (RequestException, GoogleAuthError) as error:
        reason = shown(" ".join(str(error).split()), 120)
        remedy = "look at the step's network and service account, then run it again"
        raise ConfigError(f"secret {shown(name)}: Secret Manager gave no answer ({reason}); {remedy}") from error
    if answer.status_code != 200:
        remedy = "grant the service account roles/secretmanager.secretAccessor on it, or mend its name in the recipe"
        raise ConfigError(f"secret {shown(name)}: Secret Manager answered {answer.status_code}; {remedy}")
    return base64.b64decode(answer.json()["payload"]["data"]).decode()


def _session() -> Any:
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
    session: Any = AuthorizedSession
    return session(credentials)
