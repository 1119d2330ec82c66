"""The key of an endpoint: where it comes from, and how it stays out of every text."""

import os
from pathlib import Path
from urllib.parse import urlsplit

from cappy.errors import ConfigError, shown

KEY_VARIABLE = "OPENAI_API_KEY"
FILE_VARIABLE = "OPENAI_API_KEY_FILE"
NO_KEY = "none"
"""Sent where no key is set: servers of one's own ask for none, and the client insists on one."""
_SECRET_QUERIES = ("key", "token", "secret", "password")


def api_key(variable: str = KEY_VARIABLE) -> str:
    """The key in a variable of the environment or else in the file that `<variable>_FILE` names; `NO_KEY` if neither.

    ConfigError, without the key, if the file cannot be read or the key could stand in no header.
    """
    source, key = variable, os.environ.get(variable, "").strip()
    path = os.environ.get(f"{variable}_FILE", "")
    if not key and path:
        source = f"{variable}_FILE"
        try:
            key = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "it is no text"
            raise ConfigError(f"{source}: {shown(path)} cannot be read ({why}); mount the key there") from None
        if not key:
            raise ConfigError(f"{source}: {shown(path)} is empty; mount the key there")
    if not all(33 <= ord(character) <= 126 for character in key):
        raise ConfigError(f"{source}: holds white space or characters beyond ASCII inside the key; set the key alone")
    return key or NO_KEY


def refuse_secrets(url: str) -> None:
    """ConfigError, without the secret, where an address carries one: specs stand in manifests and logs."""
    parts = urlsplit(url)
    named = [pair.partition("=")[0].lower() for pair in parts.query.split("&")]
    if parts.username or parts.password or any(word in name for name in named for word in _SECRET_QUERIES):
        raise ConfigError(
            f"openai: the address of {parts.hostname} carries a name, a password or a key; "
            f"take it out of the spec and set {KEY_VARIABLE}"
        )


def without(key: str, text: str) -> str:
    """A text as it may be shown: one line, without the key, which servers like to repeat."""
    line = " ".join(text.split())
    return line if key == NO_KEY else line.replace(key, "***")
