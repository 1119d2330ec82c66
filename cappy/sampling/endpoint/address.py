"""The address of an endpoint, and the API key that is sent to it."""

import os
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from cappy.errors import ConfigError, quote
from cappy.redaction import has_secret, redact_address, register_secret

KEY_VARIABLE = "OPENAI_API_KEY"
KEY_FILE_VARIABLE = "OPENAI_API_KEY_FILE"
NO_KEY = "none"
"""Sent if no key is set: the client requires one, a local server does not."""


def api_key(variable: str = KEY_VARIABLE) -> str:
    """The key from an environment variable, or from the file in `<variable>_FILE`; `NO_KEY` if neither is set.

    Raises ConfigError, without the key, if the file cannot be read or the key is not valid in a header.
    """
    source, key = variable, os.environ.get(variable, "").strip()
    path = os.environ.get(f"{variable}_FILE", "")
    if not key and path:
        source = f"{variable}_FILE"
        try:
            key = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise ConfigError(f"{source}: {quote(path)} cannot be read ({reason}); mount the key there") from None
        if not key:
            raise ConfigError(f"{source}: {quote(path)} is empty; mount the key there")
    if not all(33 <= ord(character) <= 126 for character in key):
        raise ConfigError(f"{source}: the key contains white space or non-ASCII characters; set only the key")
    register_secret(key)
    return key or NO_KEY


def refuse_secrets(url: str) -> None:
    """Raises ConfigError, without the secret, if an address contains one: specs appear in manifests and logs."""
    if has_secret(url):
        raise ConfigError(
            f"openai: the address {redact_address(url)} contains a user name, a password or a key; "
            f"remove it from the spec and set {KEY_VARIABLE}"
        )


_OPERATIONS = ("/chat/completions", "/completions", "/models")
_JWT_PREFIX = "eyJ"
"""Prefix of a JWT, such as a token of Microsoft Entra, which goes into the Authorization header."""


def base_address(url: str) -> str:
    """The address without a trailing slash or operation, with `/v1` if it has no path; see `join_path`."""
    parts = urlsplit(url.strip())
    path = parts.path.rstrip("/")
    operation = next((suffix for suffix in _OPERATIONS if path.endswith(suffix)), "")
    path = path.removesuffix(operation).rstrip("/") or "/v1"
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def join_path(base: str, path: str) -> str:
    """The address of an operation such as `/models`; keeps a query: host/d?v=1 -> host/d/models?v=1."""
    parts = urlsplit(base)
    return urlunsplit((parts.scheme, parts.netloc, parts.path + path, parts.query, ""))


def key_headers(base: str, authorization: str) -> dict[str, str]:
    """The header that sends the key: `authorization` unchanged, or in Azure's form; no header if it is empty.

    Azure's API, recognized by `api-version` in the address, expects a key in the header `api-key`.
    """
    scheme, _, key = authorization.strip().partition(" ")
    has_version = any(name.lower() == "api-version" for name, _ in parse_qsl(urlsplit(base).query, True))
    if has_version and scheme.lower() == "bearer" and not key.strip().startswith(_JWT_PREFIX):
        return {"api-key": key.strip()}
    return {"Authorization": authorization} if authorization else {}
