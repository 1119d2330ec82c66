"""Checks of API keys, host names and origins for both services.

A page can send requests to any address that its visitor's machine can reach. The Host header holds the name that the
browser resolved, so a foreign name that resolves to 127.0.0.1 (DNS rebinding) is refused. Origin and Sec-Fetch-Site
say which page sent the request.
"""

import hmac
import ipaddress
import os
import re
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from fastapi import Response
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from cappy.errors import ConfigError, quote
from serving.bodies import Refusal
from serving.config import ANY

KEYS_VARIABLE = "CAPPY_API_KEYS"
MIN_SECRET_CHARACTERS = 8
INTERNAL_SUFFIXES = (".svc", ".cluster.local", ".local", ".internal")
"""Suffixes that public DNS does not resolve, so an attacker cannot make such a name resolve to this machine."""
_NAME = r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(?::([0-9]{1,5}))?"
_HOST = re.compile(_NAME)
_ORIGIN = re.compile(f"(https?)://{_NAME}")
_PORTS = {"http": "80", "https": "443"}
WriteRefusal = Callable[[str, Refusal], Response]
"""(path, refusal) -> the response, in the shape that the path's clients expect."""


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """The names (Host header) that a service answers to: always those in `allowed` (`*` stands for any).

    A service that listens on `loopback` also answers to `localhost` and loopback addresses. Any other service answers
    to all names if clients need a key (`keys`); otherwise it also answers to addresses, names without a dot, names with
    one of `INTERNAL_SUFFIXES`, and the machine's own name.
    """

    allowed: Sequence[str] = ()
    loopback: bool = False
    keys: bool = False

    def allow(self, name: str) -> bool:
        """Whether the service answers to a name or an address (without a port)."""
        name = name.lower().removesuffix(".")
        if any(_matches(name, pattern.lower()) for pattern in self.allowed):
            return True
        address = _address(name)
        if self.loopback:
            return name == "localhost" or (address is not None and _is_loopback(address))
        own_name = socket.gethostname().lower()
        return (
            self.keys or address is not None or "." not in name or name == own_name or name.endswith(INTERNAL_SUFFIXES)
        )


ANY_HOST = Hosts(allowed=(ANY,))


def hosts_of(listener: socket.socket, allowed: Sequence[str], keys: bool) -> Hosts:
    """The host names that a service on this bound socket answers to; `keys`: whether clients need a key."""
    address = _address(str(listener.getsockname()[0]))
    return Hosts(allowed=allowed, loopback=address is not None and _is_loopback(address), keys=keys)


class BrowserGuard:
    """ASGI middleware: refuses requests for another host name (421) or from a page of another origin (403).

    Status 421: RFC 9110, section 15.5.20.
    """

    def __init__(self, app: ASGIApp, hosts: Hosts, origins: Sequence[str], write_refusal: WriteRefusal) -> None:
        self._app = app
        self._hosts = hosts
        self._origins = frozenset(origins)
        self._write_refusal = write_refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope, Headers(scope=scope))
        except Refusal as refusal:
            await self._write_refusal(scope["path"], refusal)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        host_headers, origin_headers = headers.getlist("host"), headers.getlist("origin")
        from_browser = bool(origin_headers) or "sec-fetch-site" in headers
        if not host_headers and not from_browser and scope.get("http_version") == "1.0":
            # A health check of a load balancer such as HAProxy; browsers never use HTTP/1.0, and always send a Host.
            return
        host = _HOST.fullmatch(host_headers[0]) if len(host_headers) == 1 else None
        if host is None:
            raise Refusal(400, "a request must have one Host header: a name or an address, optionally with a port")
        if not self._hosts.allow(host[1]):
            name = quote(host[1])
            raise Refusal(
                421, f"this service does not answer to the host name {name}; its owner can allow it: --allowed-hosts"
            )
        if ANY in self._origins or (not origin_headers and not _is_cross_site(scope["method"], headers)):
            return
        if not (
            len(origin_headers) == 1
            and (origin_headers[0] in self._origins or _is_own(origin_headers[0], host, scope["scheme"]))
        ):
            source = f"a page of {quote(origin_headers[0])}" if origin_headers else "a page of another site"
            raise Refusal(
                403, f"{source} may not send requests to this service; its owner can allow it: --allow-origin"
            )


def _is_cross_site(method: str, headers: Headers) -> bool:
    """Whether a request without an Origin comes from another site's page; following a link to this one is allowed."""
    if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
        return False
    is_navigation = (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == ("navigate", "document")
    return not (is_navigation and method in ("GET", "HEAD"))


def _is_own(origin: str, host: re.Match[str], scheme: str) -> bool:
    """Whether an origin is the service's own, by its name and port.

    Behind a proxy that ends TLS the origin is https and the request http, so the scheme is only compared if this
    service ends TLS itself.
    """
    parts = _ORIGIN.fullmatch(origin)
    if parts is None or (scheme == "https" and parts[1] != "https"):
        return False
    default_port = _PORTS[parts[1]]
    return (parts[2].lower(), parts[3] or default_port) == (host[1].lower(), host[2] or default_port)


def _matches(name: str, allowed: str) -> bool:
    if allowed == ANY or name == allowed.removesuffix("."):
        return True
    return allowed.startswith("*.") and name.endswith(allowed[1:])


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return None


def _is_loopback(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


class Keys:
    """The valid API keys, stored as digests; if there are none, no key is needed."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def allow(self, headers: Mapping[str, str]) -> bool:
        """Whether `Authorization: Bearer KEY` has a valid key, compared in constant time."""
        if not self._digests:
            return True
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = _digest(key.strip() if scheme.lower() == "bearer" else "")
        return bool(sum(hmac.compare_digest(digest, valid_digest) for valid_digest in self._digests))


def read_keys(path: Path | None) -> Keys:
    """Reads keys from a file, one per line, or from CAPPY_API_KEYS, separated by commas.

    Lines that start with # are comments. Raises ConfigError for a short key, and if a file or a non-empty variable
    holds no key, since its owner does not want an open service.
    """
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-keys {path}: cannot be read; give a text file with one key per line") from error
        lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    else:
        text = os.environ.get(KEYS_VARIABLE, "")
        lines = text.split(",")
    keys = [key.strip() for key in lines if key.strip()]
    if path is not None and not keys:
        raise ConfigError(f"--api-keys {path}: holds no key; write one per line")
    if text and not keys:
        raise ConfigError(f"{KEYS_VARIABLE}: holds no key; set it to keys separated by commas, or unset it")
    if any(len(key) < MIN_SECRET_CHARACTERS for key in keys):
        source = f"--api-keys {path}" if path is not None else KEYS_VARIABLE
        raise ConfigError(
            f"{source}: has a key shorter than {MIN_SECRET_CHARACTERS} characters; make one with: openssl rand -hex 24"
        )
    return Keys(keys)


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogatepass")).digest()


class KeyGuard:
    """ASGI middleware: if there are keys, every path except `open_paths` needs one."""

    def __init__(self, app: ASGIApp, keys: Keys, open_paths: Collection[str], write_refusal: WriteRefusal) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = frozenset(open_paths)
        self._write_refusal = write_refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open_paths or self._keys.allow(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        await self._write_refusal(scope["path"], unknown_key_refusal())(scope, receive, send)


def unknown_key_refusal() -> Refusal:
    """The refusal of a request without a valid key."""
    return Refusal(401, "missing or unknown API key; send Authorization: Bearer KEY")
