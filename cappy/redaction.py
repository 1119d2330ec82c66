"""Removes secrets from texts by their value, and from addresses by their position.

A server's error or a library's exception may repeat what it was sent. Every text is redacted whole
and cut afterwards, because part of a key is a secret too.
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

SHORTEST = 6
"""Characters of a secret that is looked for: a shorter one would blank ordinary words."""
FEWEST = 4
"""Characters of the beginning of a secret that is taken out at the end of a text."""
HIDDEN = "***"
WINDOW = 65_536
"""Characters of a text that are looked at where only its beginning is shown."""
_LONGEST_FILE = 65_536
_NAME = re.compile(
    r"(?:^|_)(?:KEYS?|TOKENS?|SECRETS?|PASSWORDS?|PASSWD|PASS|CREDENTIALS?|CONNECTION_STRING|HEADERS|SAS)$"
)
_LISTS = ("KEYS", "TOKENS", "SECRETS", "PASSWORDS", "CREDENTIALS")
_FILES = ("_FILE", "_CREDENTIALS")
_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
_QUERY_NAME = re.compile(r"key|token|secret|passw|pwd|sig|credential|auth", re.IGNORECASE)
_PARAMETER = re.compile(r"([?&;#])([^=&;#?]*)=([^&;#]*)")
_PERCENT = re.compile("%[0-9A-F]{2}")
_JSON_ESCAPES = (("<>&", "x"), ("<>&'", "x"), ("<>&'+`\"", "X"))
"""What is written as \\u00.. in JSON though it need not be: by Go, by Jinja, by .NET; and the case of the digits."""
_ORDINARY = {"required", "enabled", "disabled", "default", "password", "secret"}
"""Words of our own texts, never redacted: as a secret each would be among the first guesses."""


@dataclass(frozen=True)
class _Known:
    """Every form in which a secret may stand in a text, the longest first."""

    forms: tuple[str, ...]
    longest: int


_USERINFO = re.compile(r"//[^/\s@]*@")
_LOG_SECONDS = 1.0
"""How long the log may miss a change of the environment, which is too slow to check for every line."""
_remembered: set[str] = set()
_cached: tuple[object, _Known] = (None, _Known((), 0))
_looked = 0.0


def remember(value: str, *, user: str = "") -> None:
    """Takes this value out of texts from now on, whatever variable it came from; with `user` also as Basic auth."""
    _remembered.update(_long([value, _basic(user, value) if user else ""]))


def remember_address(address: str) -> None:
    """Takes the password and the tokens of this address out of texts from now on."""
    _remembered.update(_of_address(address))


def redact(text: str, *keys: str) -> str:
    """The text with `***` for every known secret and for these keys, in the forms that programs write them in.

    Known are the variables of the environment whose names say so, the files that they name, passwords and tokens in
    addresses, and what `remember` was given. Secrets of fewer than 6 characters stay, and so does "password".
    """
    return _redact(text, _known_forms().forms, keys)


def _redact(text: str, forms: tuple[str, ...], keys: Iterable[str] = ()) -> str:
    if any(len(key.strip()) >= SHORTEST for key in keys):
        more = (form for key in keys if len(key.strip()) >= SHORTEST for form in _forms(key.strip()))
        forms = tuple(sorted({*forms, *more}, key=len, reverse=True))
    for form in forms:
        if form in text:
            text = text.replace(form, HIDDEN)
    return _USERINFO.sub("//…@", text) if "@" in text else text


def truncate(text: str, limit: int, *keys: str) -> str:
    """At most `limit` characters of the text, redacted before it is cut.

    Where the text ends within a secret, as a body that was broken off does, the beginning of the secret goes too.
    """
    redacted = redact(text[:WINDOW], *keys)
    if len(text) > WINDOW:
        # The window may end within a secret, which is then not known by its value.
        longest = max([_known_forms().longest, *(len(form) for key in keys for form in _forms(key.strip()))])
        redacted = f"{redacted[: max(0, min(len(redacted) - longest, limit))]}…"
    else:
        redacted = _strip_partial_secret(
            redacted, [*_known_forms().forms, *(form for key in keys for form in _forms(key.strip()))]
        )
    return redacted if len(redacted) <= limit else f"{redacted[: limit - 1]}…"


def _strip_partial_secret(text: str, forms: Iterable[str]) -> str:
    """The text without the beginning of a secret (`FEWEST` characters or more) that it ends with."""
    bare = text.rstrip("'\"")  # what repr puts behind it
    for form in forms:
        start = bare.rfind(form[:FEWEST], max(0, len(bare) - len(form) + 1))
        if start >= 0 and len(form) >= SHORTEST and form.startswith(bare[start:]):
            return f"{bare[:start]}{HIDDEN}{text[len(bare) :]}"
    return text


def one_line(text: str, limit: int, *keys: str) -> str:
    """The text for one line of an error: redacted, white space and control characters made spaces, then cut."""
    start = truncate(text, WINDOW, *keys)
    line = " ".join("".join(character if character.isprintable() else " " for character in start).split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def redact_address(address: str) -> str:
    """The address as it may be shown: no user, password, or query whose name says that it is a secret.

    A password may itself hold `@`, `/`, `?` and `#`: everything up to the last `@` is taken for one.
    """
    scheme, separator, rest = address.partition("://")
    if not separator or rest.startswith("/"):
        return redact(address)
    before, at, after = rest.rpartition("@")
    if at and any(_QUERY_NAME.search(name) for _, name, _ in _PARAMETER.findall(before)):
        # The last @ may stand in a token: what is behind it is then a part of a secret.
        return f"{scheme}://…"
    hidden = _PARAMETER.sub(lambda m: f"{m[1]}{m[2]}={HIDDEN}" if _QUERY_NAME.search(m[2]) else m[0], after)
    return redact(f"{scheme}://{'…@' if at else ''}{hidden}")


def has_secret(address: str) -> bool:
    """Whether the address holds a password or a token; a user's name alone is none but for HTTP, where it may be."""
    scheme, _, rest = address.partition("://")
    if not rest or rest.startswith("/"):
        return False
    before, at, _ = rest.rpartition("@")
    named = bool(at) and (":" in before or scheme in ("http", "https"))
    return named or any(_QUERY_NAME.search(name) for _, name, _ in _PARAMETER.findall(rest))


def redact_output() -> None:
    """Lets this process print tracebacks of defects, of any thread, and log without secrets."""
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
    """A record of the log whose message and traceback hold no secret."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        if self.exc_info and self.exc_info[0] is not None:
            # Formatters print this where it is there.
            self.exc_text = redact("".join(traceback.format_exception(*self.exc_info)).rstrip("\n"))

    def getMessage(self) -> str:  # noqa: N802 (the name is the library's)
        """The message."""
        return _redact(super().getMessage(), _known_forms(patience=_LOG_SECONDS).forms)


def _known_forms(patience: float = 0.0) -> _Known:
    """The forms of all known secrets; made anew when the environment or a file of secrets has changed.

    With `patience` a change of the last seconds may be missed.
    """
    global _cached, _looked
    now = time.monotonic()
    if now - _looked < patience:
        return _cached[1]
    _looked = now
    environment = dict(os.environ)
    state = (environment, len(_remembered), [_stamp(path) for path in _paths(environment)])
    if _cached[0] != state:
        values = {*_remembered, *_of_environment(environment)}
        forms = sorted({form for value in values for form in _forms(value)}, key=len, reverse=True)
        _cached = (state, _Known(tuple(forms), len(forms[0]) if forms else 0))
    return _cached[1]


def _of_environment(environment: dict[str, str]) -> Iterator[str]:
    paths = _paths(environment)
    for path in paths:
        yield from _parts(_text(path), lists=True)
    for name, value in environment.items():
        upper = name.upper()
        if "://" in value:
            yield from _of_address(value)
        if not _NAME.search(upper) or (upper.endswith(_FILES) and Path(value) in paths):
            continue
        if upper.endswith("HEADERS"):
            yield from _of_headers(value)
        else:
            yield from _parts(value, lists=upper.endswith(_LISTS))
    user, password = (environment.get(f"MLFLOW_TRACKING_{name}", "").strip() for name in ("USERNAME", "PASSWORD"))
    if password:
        yield _basic(user, password)


def _paths(environment: dict[str, str]) -> list[Path]:
    """The files that variables name and whose content is a secret."""
    named = [
        Path(value)
        for name, value in environment.items()
        if value and name.upper().endswith(_FILES) and _NAME.search(name.upper().removesuffix("_FILE"))
    ]
    return [path for path in [*named, _SERVICE_ACCOUNT] if _stamp(path)]


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return (status.st_mtime_ns, status.st_size)


def _text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(_LONGEST_FILE)
    except OSError:
        return ""


def _parts(text: str, *, lists: bool) -> set[str]:
    """The secrets in a value: the whole, each of a list, and what secret names have in JSON and connection strings."""
    parts = {text, *(re.split(r"[,\n]", text) if lists else ())}
    pairs = (pair.partition("=") for pair in text.split(";"))
    parts.update(value for name, _, value in pairs if _QUERY_NAME.search(name))
    if text.lstrip().startswith("{"):
        try:
            values: dict[str, object] = json.loads(text)
        except (ValueError, RecursionError):
            values = {}
        named = [value for name, value in values.items() if _QUERY_NAME.search(name) and isinstance(value, str)]
        # A private key is also printed line by line.
        parts.update(line for value in named for line in [value, *value.split("\n")] if not line.startswith("-----"))
    return _long(parts)


def _of_headers(text: str) -> set[str]:
    """The values of `name=value,...`, percent-encoded or not, with and without the scheme before a token."""
    values = [pair.partition("=")[2].strip() for pair in text.split(",")]
    decoded = [*values, *map(unquote, values)]
    return _long([*decoded, *(value.split()[-1] for value in decoded if value)])


def _long(values: Iterable[str]) -> set[str]:
    """Those of the values that are looked for."""
    stripped = {value.strip() for value in values}
    return {value for value in stripped if len(value) >= SHORTEST and value.lower() not in _ORDINARY}


def _of_address(address: str) -> set[str]:
    """Passwords and tokens of an address, as they stand there and decoded."""
    scheme, _, rest = address.partition("://")
    if rest.startswith("/"):
        return set()
    authority, at, _ = rest.rpartition("@")
    user, colon, password = authority.partition(":")
    # A parser that ends the host elsewhere names the parts in its error.
    parts = {password, *re.split("[@/?#:]", password)} if at and colon else set()
    if at and not colon and scheme in ("http", "https") and len(user) >= 3 * SHORTEST:
        parts.add(user)  # A token in a user's place.
    parts.update(value for _, name, value in _PARAMETER.findall(rest) if _QUERY_NAME.search(name))
    basic = {_basic(unquote(user), unquote(password))} if password else set()
    return _long([*parts, *map(unquote, parts), *basic])


def _basic(user: str, password: str) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def _escape_json(text: str, marks: str, digits: str) -> str:
    """JSON with these marks, where they stand for themselves, as their codes in hexadecimal digits of this case."""
    for mark in marks:
        text = text.replace('\\"' if mark == '"' else mark, f"\\u{ord(mark):04{digits}}")
    return text


def _forms(value: str) -> Iterable[str]:
    """The value as it is, and as addresses, JSON, Python, HTML and headers write it."""
    data = value.encode("utf-8", "surrogatepass")
    encoded = {base64.b64encode(data).decode(), base64.urlsafe_b64encode(data).decode()}
    written = {quote(data, safe=""), quote(data), quote_plus(data), escape(value), repr(value)[1:-1], repr(data)[2:-1]}
    written |= {_PERCENT.sub(lambda m: m[0].lower(), form) for form in written if "%" in form}
    written.add(escape(value).replace("&quot;", "&#34;").replace("&#x27;", "&#39;"))
    in_json = {json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]}
    in_json |= {form.replace("/", "\\/") for form in in_json}
    in_json |= {_escape_json(form, marks, digits) for form in in_json for marks, digits in _JSON_ESCAPES}
    # An answer's text is often the JSON of another server.
    written |= in_json | {json.dumps(form)[1:-1] for form in in_json}
    forms = {value, *written, *encoded, *(one.rstrip("=") for one in encoded)}
    return (form for form in forms if len(form) >= SHORTEST)
