"""API keys: who may ask for scores."""

import hmac
import os
from collections.abc import Collection, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from cappy.errors import ConfigError
from serving.browsers import Refuse
from serving.refusals import Refusal

VARIABLE = "CAPPY_API_KEYS"
SHORTEST = 8


class Keys:
    """The keys that are known; without any, everybody may ask. Only their digests are kept."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def allow(self, headers: Mapping[str, str]) -> bool:
        """Whether `Authorization: Bearer KEY` has a known key; a wrong one takes as long as a right one."""
        if not self._digests:
            return True
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip() if scheme.lower() == "bearer" else "")
        return bool(sum(hmac.compare_digest(given, known) for known in self._digests))


def read_keys(path: Path | None) -> Keys:
    """Keys from a file, one a line, or from CAPPY_API_KEYS, separated by commas; ConfigError for a short one.

    Lines that begin with # are comments. A file, or a variable that is not empty, that holds no key is refused: who
    gave it did not want an open service.
    """
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-keys {path}: cannot be read; give a text file with one key a line") from error
        found = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    else:
        text = os.environ.get(VARIABLE, "")
        found = text.split(",")
    keys = [key.strip() for key in found if key.strip()]
    if path is not None and not keys:
        raise ConfigError(f"--api-keys {path}: holds no key; write one a line")
    if text and not keys:
        raise ConfigError(f"{VARIABLE}: holds no key; put keys there, with commas between, or unset it")
    if any(len(key) < SHORTEST for key in keys):
        raise ConfigError(f"an API key is shorter than {SHORTEST} characters; make one with: openssl rand -hex 24")
    return Keys(keys)


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogatepass")).digest()


class KeyGuard:
    """ASGI middleware: every path but the `open` ones needs a key, where there are keys."""

    def __init__(self, app: ASGIApp, keys: Keys, open_paths: Collection[str], refuse: Refuse) -> None:
        self._app = app
        self._keys = keys
        self._open = frozenset(open_paths)
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open or self._keys.allow(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        await self._refuse(scope["path"], unknown())(scope, receive, send)


def unknown() -> Refusal:
    """What a client without a known key is answered."""
    return Refusal(401, "no API key that this service knows; send Authorization: Bearer KEY")
