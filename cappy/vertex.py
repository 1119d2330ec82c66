"""Helpers around Vertex AI's SDK: keep it silent on stdout, check the endpoint, translate its errors to one line."""

import contextlib
import logging
import re
import socket
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit
from urllib.request import getproxies

from google.api_core.exceptions import GoogleAPICallError, GoogleAPIError
from google.auth.exceptions import GoogleAuthError
from requests.exceptions import RequestException

from cappy.errors import ConfigError, quote

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
