"""Vertex AI's SDK as we use it: silent on stdout, and what it refuses in one line."""

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

REACH_SECONDS = 4.0


def hush() -> None:
    """The SDK tells what it does on stdout, where our own answer goes, by a logger of each of its modules."""
    for name in logging.root.manager.loggerDict:
        if name.startswith("google.cloud.aiplatform"):
            logging.getLogger(name).setLevel(logging.WARNING)


def reach(region: str, endpoint: str = "") -> None:
    """ConnectionError within seconds where nobody answers at the address: the SDK itself asks for two minutes."""
    parts = urlsplit(endpoint or f"https://{region}-aiplatform.googleapis.com")
    if parts.scheme in getproxies():
        return  # Who stands in between may know names that this machine does not.
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=REACH_SECONDS).close()
    except OSError as error:
        raise ConnectionError(f"{parts.hostname}: {error.strerror or error}") from error


@contextlib.contextmanager
def translate_errors(step: str, project: str, region: str, remedies: Mapping[int, str] | None = None) -> Iterator[None]:
    """What the service or the credentials refuse, and a service that does not answer, as one line.

    `remedies` says what to do about a status, where more can be said than to mend it.
    """
    place = f"Vertex AI, project {project}, {region}"
    try:
        yield
    except GoogleAuthError as error:
        reason = " ".join(str(error).split())
        remedy = "log in with `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS"
        raise ConfigError(f"{step}: {place}: no credentials ({quote(reason, 120)}); {remedy}") from error
    except ValueError as error:
        # The SDK's own checks: a region, a machine or an accelerator that it does not know.
        raise ConfigError(f"{step}: {place}: {quote(' '.join(str(error).split()), 200)}; mend that setting") from error
    except GoogleAPICallError as error:
        # Over REST the request stands in front of the service's words.
        words = re.sub(r"^[A-Z]+ \S+: ", "", str(error.message))
        reason = quote(" ".join(words.split()), 200)
        code = int(error.code) if error.code else 0
        remedy = (remedies or {}).get(code, "mend that, then run the same command again")
        raise ConfigError(f"{step}: {place}: refused ({code}, {reason}); {remedy}") from error
    except (GoogleAPIError, RequestException, ConnectionError) as error:
        # Without an answer: nobody listens, the SDK asked again until its time was up (RetryError), or could not read
        # what came.
        reason = quote(" ".join(str(error).split()), 200)
        remedy = "look at the network and the service's state, then run the same command again"
        raise ConfigError(f"{step}: {place}: gave no answer ({reason}); {remedy}") from error
