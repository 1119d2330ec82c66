"""Loads a scorer and serves it until SIGTERM."""

import contextlib
import errno
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn

from cappy import registry
from cappy.errors import CappyError, ConfigError
from cappy.registry import Version
from cappy.scoring import Precision
from cappy.specs import parse_spec
from serving.app import Options, create_app
from serving.browsers import hosts_of
from serving.connections import ACCEPTS, Connections, connections_for_clients, raise_file_limit
from serving.ending import NoticeServer
from serving.following import Follower, follow_seconds, load_version
from serving.models import Model, Models, load
from serving.protocol import AT_ONCE, PunctualProtocol
from serving.repeats import log_to_stderr
from serving.tracing import tracing

DEFAULT_SCORER = "models:/cappy@champion"
Follow = Callable[[Models], Follower]
"""What changes the model while requests are answered."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where to listen, with TLS where a certificate is given; times in seconds.

    After SIGTERM the service is not ready but answers for `notice_seconds`, so that a balancer can look elsewhere; then
    it takes no more connections and finishes what it has within `grace_seconds`. `allowed_hosts` are names to answer to
    beside those that the address gives, see `Hosts`.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    certificate: Path | None = None
    key: Path | None = None
    notice_seconds: float = 1.0
    grace_seconds: int = 30
    allowed_hosts: Sequence[str] = ()


def run(
    scorer: str = DEFAULT_SCORER,
    address: Address | None = None,
    options: Options | None = None,
    *,
    name: str = "",
    precision: Precision = "auto",
    batch_tokens: int = 0,
    follow: float | None = None,
) -> None:
    """Takes the address, loads the scorer, listens; returns when it was told to stop and has answered what it had.

    ConfigError if the address cannot be had, which is found out before the scorer is loaded. SIGTERM ends the process
    with status 0. `batch_tokens` 0 is what suits the device. An alias is followed: `follow` seconds lie between two
    looks at it, 30 where none are given, 0 for none.
    """
    parse_spec(scorer)
    seconds = follow_seconds(scorer, follow)
    address, options = address or Address(), options or Options()
    _check_tls(address)
    if not seconds:
        serve(lambda: load(scorer, name, precision), address, options, batch_tokens=batch_tokens)
        return

    def find() -> Version:
        return registry.resolve(scorer)

    def load_found(version: Version) -> Model:
        return load_version(version, scorer, name, precision)

    def followed(models: Models) -> Follower:
        return Follower(models=models, alias=scorer, find=find, load=load_found, seconds=seconds)

    serve(lambda: load_found(find()), address, options, batch_tokens=batch_tokens, follow=followed)


def serve(
    load: Callable[[], Model],
    address: Address,
    options: Options,
    *,
    batch_tokens: int = 0,
    follow: Follow | None = None,
) -> None:
    """`run` with whatever model `load` gives."""
    signal.signal(signal.SIGTERM, end)
    log_to_stderr()
    raise_file_limit()
    failures: list[CappyError] = []

    def failed(error: CappyError) -> None:
        failures.append(error)
        server.should_exit = True

    with bound(address.host, address.port) as listener:
        computing = ThreadPoolExecutor(1, "computing")
        models = Models(computing.submit(load).result())
        with _address_errors(address.host, address.port):
            listener.listen(2048)
        tokens = batch_tokens or getattr(models.current.engine, "batch_tokens", options.batch_tokens)
        hosts = hosts_of(listener, address.allowed_hosts, bool(options.keys))
        options = replace(options, batch_tokens=tokens, hosts=hosts)
        follower = follow(models) if follow else None
        app = create_app(models, options, failed=failed, follower=follower, computing=computing, tracing=tracing())
        server = NoticeServer(http_config(app, address), models, address.notice_seconds)
        scheme = "https" if address.certificate else "http"
        sys.stderr.write(
            f"cappy serve: scorer {models.current.version} at {url(listener, scheme)} "
            "(a page at /, POST /score, GET /ready; /openapi.json has every path)\n"
        )
        server.run(sockets=[listener])
    if failures:
        raise failures[0]


def _check_tls(address: Address) -> None:
    if (address.certificate is None) != (address.key is None):
        raise ConfigError("--tls-certificate and --tls-key: give both or none")
    for given, flag in ((address.certificate, "--tls-certificate"), (address.key, "--tls-key")):
        if given is not None and not given.is_file():
            raise ConfigError(f"{flag} {given}: no such file; give one in PEM form")
    if address.certificate is None or address.key is None:
        return
    try:
        # An empty passphrase, or OpenSSL would ask for one at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(address.certificate, address.key, password=lambda: "")
    except OSError as error:  # SSLError is one
        text = f"--tls-certificate {address.certificate}: cannot be used with --tls-key {address.key}"
        remedy = "give a certificate and the private key that belongs to it, both in PEM form, without a passphrase"
        raise ConfigError(f"{text} ({error.strerror or error}); {remedy}") from error


def http_config(app: object, address: Address, *, upstream: bool = False) -> uvicorn.Config:
    """How both services speak HTTP: punctual clients, patient connections, a time to finish in.

    `upstream` says that the service opens connections itself, and needs files for them.
    """
    connections = Connections(connections_for_clients(upstream=upstream))
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=partial(PunctualProtocol, connections=connections),  # type: ignore[arg-type]
        backlog=ACCEPTS,
        h11_max_incomplete_event_size=AT_ONCE,
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=address.grace_seconds,
        ssl_certfile=address.certificate,
        ssl_keyfile=address.key,
    )


@contextlib.contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that holds the address and does not listen yet; ConfigError if it cannot be had."""
    with _address_errors(host, port):
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with _address_errors(host, port):
            listener.bind(address)
        yield listener


@contextlib.contextmanager
def _address_errors(host: str, port: int) -> Iterator[None]:
    """What keeps a socket from its address becomes one line with its remedy."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            text = f"{host}:{port}: is in use by another process; stop it or choose another --port (0: any free one)"
        elif error.errno == errno.EACCES:
            text = f"{host}:{port}: may not be used without root's rights; choose a --port above 1023"
        else:
            text = f"{host}:{port}: is no address of this machine ({error.strerror}); try --host 127.0.0.1"
        raise ConfigError(text) from error


def url(listener: socket.socket, scheme: str = "http") -> str:
    """The address that a socket listens on."""
    host, port = listener.getsockname()[:2]
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def end(signum: int, frame: FrameType | None) -> None:
    """Ends with status 0; uvicorn raises the signal again after its own graceful stop, so this is the last word."""
    raise SystemExit(0)
