"""Google Cloud: helpers around Vertex AI's SDK, and secrets from Secret Manager.

The helpers keep the SDK silent on stdout, check its endpoint and translate its errors to one line. Secrets are read
where the platform cannot put them into the environment of a step: CAPPY_SECRETS is a JSON object that maps environment
variables to names of secrets. Their values are only put into the environment of this process.
"""

import base64
import contextlib
import json
import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import getproxies

from cappy.errors import ConfigError, quote
from cappy.redaction import one_line, register_secret

if TYPE_CHECKING:
    from requests import Session

CONNECT_TIMEOUT_SECONDS = 4.0


def silence_sdk() -> None:
    """Raises the level of the SDK's loggers, one per module, to WARNING: they write to stdout, where our results go."""
    for name in logging.root.manager.loggerDict:
        if name.startswith("google.cloud.aiplatform"):
            logging.getLogger(name).setLevel(logging.WARNING)


def check_reachable(region: str, endpoint: str = "") -> None:
    """Raises ConnectionError within seconds if nothing listens at the address; the SDK itself retries for minutes."""
    address = urlsplit(endpoint or f"https://{region}-aiplatform.googleapis.com")
    if address.scheme in getproxies():
        return  # The proxy may resolve names that this machine cannot.
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=CONNECT_TIMEOUT_SECONDS).close()
    except OSError as error:
        raise ConnectionError(f"{address.hostname}: {error.strerror or error}") from error


@contextlib.contextmanager
def translate_errors(step: str, project: str, region: str, remedies: Mapping[int, str] | None = None) -> Iterator[None]:
    """Raises ConfigError with one line for errors of the service or the credentials, or if the service gives no answer.

    `remedies` maps a status code to what the user should do about it.
    """
    from google.api_core.exceptions import GoogleAPICallError, GoogleAPIError
    from google.auth.exceptions import GoogleAuthError
    from requests.exceptions import RequestException

    location = f"Vertex AI, project {project}, {region}"
    try:
        yield
    except GoogleAuthError as error:
        reason = " ".join(str(error).split())
        remedy = "log in with `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS"
        raise ConfigError(f"{step}: {location}: no credentials ({quote(reason, 120)}); {remedy}") from error
    except ValueError as error:
        # The SDK's own checks: an unknown region, machine or accelerator.
        raise ConfigError(
            f"{step}: {location}: {quote(' '.join(str(error).split()), 200)}; fix that setting"
        ) from error
    except GoogleAPICallError as error:
        # Over REST the message starts with the request.
        message = re.sub(r"^[A-Z]+ \S+: ", "", str(error.message))
        reason = quote(" ".join(message.split()), 200)
        code = int(error.code) if error.code else 0
        remedy = (remedies or {}).get(code, "fix that, then run the same command again")
        raise ConfigError(f"{step}: {location}: refused ({code}, {reason}); {remedy}") from error
    except (GoogleAPIError, RequestException, ConnectionError) as error:
        # No usable answer: nothing listens, the SDK's retries ran out (RetryError), or it could not parse the answer.
        reason = quote(" ".join(str(error).split()), 200)
        remedy = "check the network and the service's status, then run the same command again"
        raise ConfigError(f"{step}: {location}: gave no answer ({reason}); {remedy}") from error


VARIABLE = "CAPPY_SECRETS"
ADDRESS = "https://secretmanager.googleapis.com"
MAX_BYTES = 1_000_000
"""Size limit of a response; a secret has at most 64 KiB."""


def fill_environment(address: str = ADDRESS) -> None:
    """Sets every variable that CAPPY_SECRETS names. Raises ConfigError with the remedy if a secret cannot be read."""
    text = os.environ.pop(VARIABLE, "")
    if not text:
        return
    try:
        secret_names: dict[str, str] = json.loads(text)
        if not isinstance(secret_names, dict) or not all(isinstance(name, str) for name in secret_names.values()):
            raise ValueError(f"got {quote(secret_names)}")
    except ValueError as error:
        raise ConfigError(
            f"{VARIABLE}: expected a JSON object of variables and secrets; compile the pipeline again"
        ) from error
    session = _session()
    for variable, name in secret_names.items():
        os.environ[variable] = value = _read(session, address, name)
        register_secret(value)


def _read(session: "Session", address: str, name: str) -> str:
    from google.auth.exceptions import GoogleAuthError
    from requests.exceptions import RequestException

    try:
        # No redirects: the token of the service account must go to this address only.
        with session.get(f"{address}/v1/{name}:access", timeout=30, allow_redirects=False, stream=True) as response:
            status = response.status_code
            body = next(response.iter_content(MAX_BYTES), b"")
    except (RequestException, GoogleAuthError) as error:
        reason = one_line(str(error), 120)
        remedy = "check the step's network and service account, then run it again"
        raise ConfigError(f"secret {quote(name)}: Secret Manager did not answer ({reason}); {remedy}") from error
    if status != 200:
        remedy = "grant the service account roles/secretmanager.secretAccessor on it, or correct its name in the recipe"
        raise ConfigError(f"secret {quote(name)}: Secret Manager answered {status}; {remedy}")
    try:
        return base64.b64decode(json.loads(body)["payload"]["data"]).decode()
    except (ValueError, KeyError, TypeError, RecursionError):
        # The cause is suppressed, because it may contain the secret.
        remedy = "check the newest version of the secret, then run the step again"
        raise ConfigError(f"secret {quote(name)}: the response of Secret Manager contains no text; {remedy}") from None


def _session() -> "Session":
    try:
        import google.auth
        from google.auth.exceptions import GoogleAuthError
        from google.auth.transport.requests import AuthorizedSession
    except ModuleNotFoundError as missing:
        remedy = "use the project's images, or pip install 'cappy-scorer[gcp]'"
        raise ConfigError(f"secrets: the package {missing.name} is missing; {remedy}") from missing
    try:
        credentials, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
    except GoogleAuthError as error:
        remedy = "run the step with a service account"
        raise ConfigError(f"secrets: no Google credentials found ({error}); {remedy}") from error
    session_class: Callable[..., Session] = AuthorizedSession  # AuthorizedSession has no annotations.
    return session_class(credentials)
