"""Loads a scorer and serves it until SIGTERM."""

import contextlib
import errno
import logging
import math
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from cappy.errors import CappyError, ConfigError, FolderError
from cappy.specs import parse_spec
from serving.app import MAX_BODY_BYTES, MAX_PAIRS, Score, create_app

DEFAULT_SCORER = "models:/cappy@champion"
DRAIN_SECONDS = 30


def run(
    scorer: str = DEFAULT_SCORER,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    max_body_bytes: int = MAX_BODY_BYTES,
    max_pairs: int = MAX_PAIRS,
) -> None:
    """Takes the address, loads the scorer, listens; returns when it was told to stop and has answered what it had.

    ConfigError if the address cannot be had, which is found out before the scorer is loaded. SIGTERM ends the process
    with status 0.
    """
    parse_spec(scorer)

    def load() -> tuple[Score, str]:
        from cappy.scoring import Scorer

        loaded = Scorer.load(scorer)
        return loaded.score, loaded.version

    serve(load, host=host, port=port, max_body_bytes=max_body_bytes, max_pairs=max_pairs)


def serve(
    load: Callable[[], tuple[Score, str]],
    *,
    host: str,
    port: int,
    max_body_bytes: int = MAX_BODY_BYTES,
    max_pairs: int = MAX_PAIRS,
) -> None:
    """`run` with whatever `load` gives: a function that scores pairs, and its version."""
    signal.signal(signal.SIGTERM, _stop)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    failures: list[CappyError] = []

    def verify() -> None:
        try:
            probe(score)
        except CappyError as error:
            failures.append(error)
            server.should_exit = True
            raise

    with bound(host, port) as listener:
        score, version = load()
        with _address_errors(host, port):
            listener.listen()
        app = create_app(score, version=version, verify=verify, max_body_bytes=max_body_bytes, max_pairs=max_pairs)
        server = uvicorn.Server(
            uvicorn.Config(
                app, log_config=None, log_level="warning", access_log=False, timeout_graceful_shutdown=DRAIN_SECONDS
            )
        )
        sys.stderr.write(f"cappy serve: scorer {version} at {_url(listener)} (POST /score, GET /health, GET /ready)\n")
        server.run(sockets=[listener])
    if failures:
        raise failures[0]


def probe(score: Score) -> None:
    """Scores one pair, which also warms the scorer up; FolderError if the answer is no finite number."""
    answer = score([("What is 1 + 1?", "2")])
    if len(answer) != 1 or not math.isfinite(answer[0]):
        raise FolderError(f"the scorer answers {answer} to one pair; its weights are damaged, fetch or train it again")


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


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _stop(signum: int, frame: FrameType | None) -> None:
    """Ends with status 0; uvicorn raises the signal again after its own graceful stop, so this is the last word."""
    raise SystemExit(0)
