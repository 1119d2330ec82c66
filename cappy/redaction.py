"""Removes secrets from texts by their value, and from addresses by their position.

A server's error or a library's exception may repeat the request. Every text is redacted first and truncated afterwards,
because a part of a key is a secret too.
"""

import base64
import json
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, quote_plus, unquote

MIN_SECRET_LENGTH = 6
"""Shorter secrets are not redacted, since they would hide ordinary words."""
MIN_PREFIX_LENGTH = 4
"""Minimum number of characters of the beginning of a secret that are redacted at the end of a truncated text."""
HIDDEN = "***"
WINDOW = 65_536
"""Characters of a text that are redacted if only its beginning is shown."""
_MAX_FILE_CHARACTERS = 65_536
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:KEYS?|TOKENS?|SECRETS?|PASSWORDS?|PASSWD|PASS|CREDENTIALS?|CONNECTION_STRING|HEADERS|SAS)$"
)
_LIST_SUFFIXES = ("KEYS", "TOKENS", "SECRETS", "PASSWORDS", "CREDENTIALS")
_FILE_SUFFIXES = ("_FILE", "_CREDENTIALS")
_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
_QUERY_NAME = re.compile(r"key|token|secret|passw|pwd|sig|credential|auth", re.IGNORECASE)
_PARAMETER = re.compile(r"([?&;#])([^=&;#?]*)=([^&;#]*)")
_PERCENT = re.compile("%[0-9A-F]{2}")
_JSON_ESCAPES = (("<>&", "x"), ("<>&'", "x"), ("<>&'+`\"", "X"))
"""Characters that Go, Jinja and .NET escape as \\u00.. in JSON although they need not, and the case of the digits."""
_ORDINARY_WORDS = {"required", "enabled", "disabled", "default", "password", "secret"}
"""Words of this project's messages, never redacted; as secrets they would be easy to guess."""


@dataclass(frozen=True)
class _SecretForms:
    """All spellings of the known secrets that may appear in a text, the longest first."""

    forms: tuple[str, ...]
    max_length: int


_USERINFO = re.compile(r"//[^/\s@]*@")
_LOG_SECONDS = 1.0
"""Maximum age of the known secrets for a log line: checking the environment for every line is too slow."""
_registered: set[str] = set()
_cached_forms: tuple[object, _SecretForms] = (None, _SecretForms((), 0))
_forms_checked_at = 0.0


def register_secret(value: str, *, user: str = "") -> None:
    """Redacts this value from now on, whatever its source; with `user` also as Basic credentials."""
    _registered.update(_long_enough([value, _basic_credentials(user, value) if user else ""]))


def register_address(address: str) -> None:
    """Redacts the password and the tokens of this address from now on."""
    _registered.update(_address_secrets(address))


def redact(text: str, *keys: str) -> str:
    """Replaces every known secret and these keys by `***`, in all spellings that programs use.

    Known secrets are environment variables with names such as API_KEY, the files that such variables name, passwords
    and tokens in addresses, and registered secrets. Secrets of fewer than 6 characters and words such as "password"
    are not replaced.
    """
    return _redact(text, _known_forms().forms, keys)


def _redact(text: str, forms: tuple[str, ...], keys: Iterable[str] = ()) -> str:
    if any(len(key.strip()) >= MIN_SECRET_LENGTH for key in keys):
        key_forms = (form for key in keys if len(key.strip()) >= MIN_SECRET_LENGTH for form in _forms(key.strip()))
        forms = tuple(sorted({*forms, *key_forms}, key=len, reverse=True))
    for form in forms:
        if form in text:
            text = text.replace(form, HIDDEN)
    return _USERINFO.sub("//…@", text) if "@" in text else text


def truncate(text: str, limit: int, *keys: str) -> str:
    """At most `limit` characters of the text, redacted before it is truncated.

    If the text ends within a secret, for example in an interrupted response, that part of the secret is redacted too.
    """
    redacted = redact(text[:WINDOW], *keys)
    if len(text) > WINDOW:
        # The window may end within a secret, which is then not recognised.
        max_length = max([_known_forms().max_length, *(len(form) for key in keys for form in _forms(key.strip()))])
        redacted = f"{redacted[: max(0, min(len(redacted) - max_length, limit))]}…"
    else:
        redacted = _strip_partial_secret(
            redacted, [*_known_forms().forms, *(form for key in keys for form in _forms(key.strip()))]
        )
    return redacted if len(redacted) <= limit else f"{redacted[: limit - 1]}…"


def _strip_partial_secret(text: str, forms: Iterable[str]) -> str:
    """The text with `***` for the beginning of a secret (at least `MIN_PREFIX_LENGTH` characters) at its end."""
    bare = text.rstrip("'\"")  # Quotes that repr adds.
    for form in forms:
        start = bare.rfind(form[:MIN_PREFIX_LENGTH], max(0, len(bare) - len(form) + 1))
        if start >= 0 and len(form) >= MIN_SECRET_LENGTH and form.startswith(bare[start:]):
            return f"{bare[:start]}{HIDDEN}{text[len(bare) :]}"
    return text


def one_line(text: str, limit: int, *keys: str) -> str:
    """The text as one line: redacted, white space and control characters replaced by spaces, then truncated."""
    start = truncate(text, WINDOW, *keys)
    line = " ".join("".join(character if character.isprintable() else " " for character in start).split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def redact_address(address: str) -> str:
    """The address without user, password and the values of query parameters whose names suggest a secret.

    A password may itself contain `@`, `/`, `?` and `#`: everything up to the last `@` counts as credentials.
    """
    scheme, separator, rest = address.partition("://")
    if not separator or rest.startswith("/"):
        return redact(address)
    before, at, after = rest.rpartition("@")
    if at and any(_QUERY_NAME.search(name) for _, name, _ in _PARAMETER.findall(before)):
        # The last @ may be part of a token, and what follows it too.
        return f"{scheme}://…"
    visible = _PARAMETER.sub(lambda m: f"{m[1]}{m[2]}={HIDDEN}" if _QUERY_NAME.search(m[2]) else m[0], after)
    return redact(f"{scheme}://{'…@' if at else ''}{visible}")


def has_secret(address: str) -> bool:
    """Whether the address contains a password or a token; for HTTP a user name alone counts too, as it may be one."""
    scheme, _, rest = address.partition("://")
    if not rest or rest.startswith("/"):
        return False
    before, at, _ = rest.rpartition("@")
    has_credentials = bool(at) and (":" in before or scheme in ("http", "https"))
    return has_credentials or any(_QUERY_NAME.search(name) for _, name, _ in _PARAMETER.findall(rest))


def redact_output() -> None:
    """Redacts all tracebacks, of any thread, and all log records of this process."""
    logging.setLogRecordFactory(_Record)

    def show(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        text = "".join(traceback.format_exception(kind, error, trace))
        sys.stderr.write(redact(text))
        sys.stderr.flush()

    def show_of_thread(arguments: threading.ExceptHookArgs) -> None:
        if arguments.exc_type is not SystemExit:
            show(arguments.exc_type, arguments.exc_value, arguments.exc_traceback)

    def show_unraisable(arguments: "sys.UnraisableHookArgs") -> None:
        show(arguments.exc_type, arguments.exc_value, arguments.exc_traceback)

    sys.excepthook = show
    sys.unraisablehook = show_unraisable
    threading.excepthook = show_of_thread


class _Record(logging.LogRecord):
    """A log record with redacted message and traceback."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.exc_info and self.exc_info[0] is not None:
            # Formatters print this instead of formatting the traceback.
            self.exc_text = redact("".join(traceback.format_exception(*self.exc_info)).rstrip("\n"))

    def getMessage(self) -> str:  # noqa: N802 (name of the overridden method)
        """The redacted message."""
        return _redact(super().getMessage(), _known_forms(max_age=_LOG_SECONDS).forms)


def _known_forms(max_age: float = 0.0) -> _SecretForms:
    """All spellings of all known secrets; computed again when the environment or a file of secrets has changed.

    Changes within the last `max_age` seconds may be missed.
    """
    global _cached_forms, _forms_checked_at
    now = time.monotonic()
    if now - _forms_checked_at < max_age:
        return _cached_forms[1]
    _forms_checked_at = now
    environment = dict(os.environ)
    state = (environment, len(_registered), [_stat_key(path) for path in _secret_files(environment)])
    if _cached_forms[0] != state:
        values = {*_registered, *_environment_secrets(environment)}
        forms = sorted({form for value in values for form in _forms(value)}, key=len, reverse=True)
        _cached_forms = (state, _SecretForms(tuple(forms), len(forms[0]) if forms else 0))
    return _cached_forms[1]


def _environment_secrets(environment: dict[str, str]) -> Iterator[str]:
    paths = _secret_files(environment)
    for path in paths:
        yield from _value_secrets(_read_start(path), lists=True)
    for name, value in environment.items():
        upper = name.upper()
        if "://" in value:
            yield from _address_secrets(value)
        if not _SECRET_NAME.search(upper) or (upper.endswith(_FILE_SUFFIXES) and Path(value) in paths):
            continue
        if upper.endswith("HEADERS"):
            yield from _header_secrets(value)
        else:
            yield from _value_secrets(value, lists=upper.endswith(_LIST_SUFFIXES))
    user, password = (environment.get(f"MLFLOW_TRACKING_{name}", "").strip() for name in ("USERNAME", "PASSWORD"))
    if password:
        yield _basic_credentials(user, password)


def _secret_files(environment: dict[str, str]) -> list[Path]:
    """The secret files that environment variables name, and the token of the service account."""
    paths = [
        Path(value)
        for name, value in environment.items()
        if value and name.upper().endswith(_FILE_SUFFIXES) and _SECRET_NAME.search(name.upper().removesuffix("_FILE"))
    ]
    return [path for path in [*paths, _SERVICE_ACCOUNT] if _stat_key(path)]


def _stat_key(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return (status.st_mtime_ns, status.st_size)


def _read_start(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(_MAX_FILE_CHARACTERS)
    except OSError:
        return ""


def _value_secrets(text: str, *, lists: bool) -> set[str]:
    """Secrets in a value: all of it, items of a list, and secret fields of JSON objects and connection strings."""
    secrets = {text, *(re.split(r"[,\n]", text) if lists else ())}
    pairs = (pair.partition("=") for pair in text.split(";"))
    secrets.update(value for name, _, value in pairs if _QUERY_NAME.search(name))
    if text.lstrip().startswith("{"):
        try:
            values: dict[str, object] = json.loads(text)
        except (ValueError, RecursionError):
            values = {}
        fields = [value for name, value in values.items() if _QUERY_NAME.search(name) and isinstance(value, str)]
        # A private key is also printed line by line.
        secrets.update(line for value in fields for line in [value, *value.split("\n")] if not line.startswith("-----"))
    return _long_enough(secrets)


def _header_secrets(text: str) -> set[str]:
    """The values of `name=value,...`, encoded and decoded, with and without an authentication scheme."""
    values = [pair.partition("=")[2].strip() for pair in text.split(",")]
    decoded = [*values, *map(unquote, values)]
    return _long_enough([*decoded, *(value.split()[-1] for value in decoded if value)])


def _long_enough(values: Iterable[str]) -> set[str]:
    """The values that are long enough to be redacted and not ordinary words."""
    stripped = {value.strip() for value in values}
    return {value for value in stripped if len(value) >= MIN_SECRET_LENGTH and value.lower() not in _ORDINARY_WORDS}


def _address_secrets(address: str) -> set[str]:
    """Passwords and tokens of an address, encoded and decoded."""
    scheme, _, rest = address.partition("://")
    if rest.startswith("/"):
        return set()
    authority, at, _ = rest.rpartition("@")
    user, colon, password = authority.partition(":")
    # A parser that splits the address in another way quotes these parts in its error.
    parts = {password, *re.split("[@/?#:]", password)} if at and colon else set()
    if at and not colon and scheme in ("http", "https") and len(user) >= 3 * MIN_SECRET_LENGTH:
        parts.add(user)  # A token in place of the user name.
    parts.update(value for _, name, value in _PARAMETER.findall(rest) if _QUERY_NAME.search(name))
    basic = {_basic_credentials(unquote(user), unquote(password))} if password else set()
    return _long_enough([*parts, *map(unquote, parts), *basic])


def _basic_credentials(user: str, password: str) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def _escape_json(text: str, characters: str, digits: str) -> str:
    """JSON text with these characters as `\\u` and four hex digits, in lower (`digits` "x") or upper case ("X")."""
    for character in characters:
        text = text.replace('\\"' if character == '"' else character, f"\\u{ord(character):04{digits}}")
    return text


def _forms(value: str) -> Iterable[str]:
    """The value as it is, and as it is escaped in addresses, JSON, Python, HTML and headers."""
    data = value.encode("utf-8", "surrogatepass")
    encoded = {base64.b64encode(data).decode(), base64.urlsafe_b64encode(data).decode()}
    escaped = {quote(data, safe=""), quote(data), quote_plus(data), escape(value), repr(value)[1:-1], repr(data)[2:-1]}
    escaped |= {_PERCENT.sub(lambda m: m[0].lower(), form) for form in escaped if "%" in form}
    escaped.add(escape(value).replace("&quot;", "&#34;").replace("&#x27;", "&#39;"))
    in_json = {json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]}
    in_json |= {form.replace("/", "\\/") for form in in_json}
    in_json |= {_escape_json(form, characters, digits) for form in in_json for characters, digits in _JSON_ESCAPES}
    # A response may quote the JSON of another server.
    escaped |= in_json | {json.dumps(form)[1:-1] for form in in_json}
    forms = {value, *escaped, *encoded, *(form.rstrip("=") for form in encoded)}
    return (form for form in forms if len(form) >= MIN_SECRET_LENGTH)
