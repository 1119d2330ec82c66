"""Protects a service from web pages: checks the Host header, and the origin of requests that a browser sends.

A page can send requests to any address that its visitor's machine reaches. The Host header says under which name the
browser found the service, so that a name which somebody points at 127.0.0.1 (DNS rebinding) is refused; Origin and
Sec-Fetch-Site say which page asked.
"""

import ipaddress
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from cappy.errors import ConfigError, shown
from serving.refusals import Refusal

VARIABLE = "CAPPY_ALLOWED_HOSTS"
ANY = "*"
INSIDE = (".svc", ".cluster.local", ".local", ".internal")
"""Suffixes of names that public DNS does not resolve, so an attacker cannot point one at this machine."""
_NAME = r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(?::([0-9]{1,5}))?"
_HOST = re.compile(_NAME)
_ORIGIN = re.compile(f"(https?)://{_NAME}")
_ALLOWED = re.compile(r"(\*\.)?[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]")
_PORTS = {"http": "80", "https": "443"}
Refuse = Callable[[str, Refusal], Response]
"""(path, refusal) -> the answer, in the shape of that path's clients."""


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """Names that a service answers to, by the Host header; `allowed` ones always, `*` stands for any.

    On `loopback` those of this machine alone. Elsewhere any where clients have `keys`; without, addresses, names
    without a dot, names that end as those `INSIDE` a cluster or a local network do, and the machine's own.
    """

    allowed: Sequence[str] = ()
    loopback: bool = False
    keys: bool = False

    def allow(self, name: str) -> bool:
        """Whether the service answers to a name or an address, given without a port."""
        name = name.lower().removesuffix(".")
        if any(_matches(name, one.lower()) for one in self.allowed):
            return True
        address = _address(name)
        if self.loopback:
            return name == "localhost" or (address is not None and _is_loopback(address))
        own = socket.gethostname().lower()
        return self.keys or address is not None or "." not in name or name == own or name.endswith(INSIDE)


ANY_HOST = Hosts(allowed=(ANY,))


def hosts_of(listener: socket.socket, allowed: Sequence[str], keys: bool) -> Hosts:
    """The names to answer to on a socket that is bound."""
    address = _address(str(listener.getsockname()[0]))
    return Hosts(allowed=allowed, loopback=address is not None and _is_loopback(address), keys=keys)


def read_hosts(given: Sequence[str], variable: str) -> list[str]:
    """Names from a flag, or from CAPPY_ALLOWED_HOSTS with commas between; ConfigError where one is no name."""
    names = [name.strip() for one in given or variable.split(",") for name in one.split(",") if name.strip()]
    for name in names:
        if name != ANY and not _ALLOWED.fullmatch(name):
            source = "--allowed-hosts" if given else VARIABLE
            remedy = "give a name without a port such as scores.example or *.example, or * for any"
            raise ConfigError(f"{source} {shown(name)}: is no name of a host; {remedy}")
    return names


def check_origins(origins: Sequence[str]) -> None:
    """ConfigError where one is not what a browser sends as an origin."""
    for origin in origins:
        if origin != ANY and not re.fullmatch(r"https?://[^/\s*]+", origin):
            raise ConfigError(f"--allow-origin {origin}: is no origin; give one such as https://app.example, or *")


class BrowserGuard:
    """ASGI middleware: refuses what comes under another name (421) or from a page of another origin (403).

    421 (RFC 9110, 15.5.20): the request reached a server that does not answer for that name.
    """

    def __init__(self, app: ASGIApp, hosts: Hosts, origins: Sequence[str], refuse: Refuse) -> None:
        self._app = app
        self._hosts = hosts
        self._origins = frozenset(origins)
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope, Headers(scope=scope))
        except Refusal as refusal:
            await self._refuse(scope["path"], refusal)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        given, origins = headers.getlist("host"), headers.getlist("origin")
        browser = bool(origins) or "sec-fetch-site" in headers
        if not given and not browser and scope.get("http_version") == "1.0":
            # A balancer's check, HAProxy's for one; browsers speak no HTTP/1.0 and always send a Host.
            return
        found = _HOST.fullmatch(given[0]) if len(given) == 1 else None
        if found is None:
            raise Refusal(400, "a request must have one Host header with a name or an address, and a port or none")
        if not self._hosts.allow(found[1]):
            name = shown(found[1])
            raise Refusal(
                421, f"this service does not answer to the name {name}; its owner may allow it: --allowed-hosts"
            )
        if ANY in self._origins or (not origins and not _of_another_page(scope["method"], headers)):
            return
        if not (len(origins) == 1 and (origins[0] in self._origins or _is_own(origins[0], found, scope["scheme"]))):
            page = f"a page of {shown(origins[0])}" if origins else "a page of another site"
            raise Refusal(403, f"{page} may not ask this service; its owner may let it: --allow-origin")


def _of_another_page(method: str, headers: Headers) -> bool:
    """Whether a browser says that another site's page asks, without an Origin; following a link to here is allowed."""
    if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
        return False
    opened = (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == ("navigate", "document")
    return not (opened and method in ("GET", "HEAD"))


def _is_own(origin: str, host: re.Match[str], scheme: str) -> bool:
    """Whether an origin is the service's own, by its name and port.

    Behind a proxy that ends TLS the origin is https and the request http, so the scheme counts only where TLS is ours.
    """
    found = _ORIGIN.fullmatch(origin)
    if found is None or (scheme == "https" and found[1] != "https"):
        return False
    usual = _PORTS[found[1]]
    return (found[2].lower(), found[3] or usual) == (host[1].lower(), host[2] or usual)


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
