"""The key of an endpoint: where it comes from, and how it stays out of every text."""

import os
from pathlib import Path

from cappy.errors import ConfigError, shown
from cappy.redaction import has_secret, redact_address, remember

KEY_VARIABLE = "OPENAI_API_KEY"
FILE_VARIABLE = "OPENAI_API_KEY_FILE"
NO_KEY = "none"
"""Sent where no key is set: servers of one's own ask for none, and the client insists on one."""


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
    remember(key)
    return key or NO_KEY


def refuse_secrets(url: str) -> None:
    """ConfigError, without the secret, where an address carries one: specs stand in manifests and logs."""
    if has_secret(url):
        raise ConfigError(
            f"openai: the address {redact_address(url)} carries a name, a password or a key; "
            f"take it out of the spec and set {KEY_VARIABLE}"
        )
