"""Addresses of endpoints: a path goes before the query, which every request keeps; and which header takes the key.

http://host:8000                                        -> http://host:8000/v1/chat/completions
https://host/v1/                                        -> https://host/v1/chat/completions
https://host/openai/deployments/d?api-version=2024-06-01
    -> https://host/openai/deployments/d/chat/completions?api-version=2024-06-01
"""

from urllib.parse import parse_qsl, urlsplit, urlunsplit

_OPERATIONS = ("/chat/completions", "/completions", "/models")
_BEGINNING_OF_JWT = "eyJ"
"""A token of Microsoft Entra is a JWT, which goes where OpenAI's keys go."""


def base_address(url: str) -> str:
    """The address that paths are joined to: no slash or operation at the end of its path, `/v1` where it has none."""
    parts = urlsplit(url.strip())
    path = parts.path.rstrip("/")
    operation = next((one for one in _OPERATIONS if path.endswith(one)), "")
    path = path.removesuffix(operation).rstrip("/") or "/v1"
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def join_path(base: str, path: str) -> str:
    """The address of an operation such as `/models`; a query of `base` stays behind it."""
    parts = urlsplit(base)
    return urlunsplit((parts.scheme, parts.netloc, parts.path + path, parts.query, ""))


def key_headers(base: str, authorization: str) -> dict[str, str]:
    """The header that carries an Authorization's credential to this address; none for an empty one.

    Azure's API, which addresses with an `api-version` belong to, reads a key from `api-key`.
    """
    scheme, _, key = authorization.strip().partition(" ")
    versioned = any(name.lower() == "api-version" for name, _ in parse_qsl(urlsplit(base).query, True))
    if versioned and scheme.lower() == "bearer" and not key.strip().startswith(_BEGINNING_OF_JWT):
        return {"api-key": key.strip()}
    return {"Authorization": authorization} if authorization else {}
