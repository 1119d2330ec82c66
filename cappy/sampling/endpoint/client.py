"""HTTP towards endpoints that are not trusted: addresses, the key, clients; answers bounded in size and time.

A body is decoded step by step and the request ended as soon as it is too large, whatever the compression. No redirect
is followed and no cookie kept: the key and the prompts go to the address that was given, and nowhere else.
"""

import contextlib
import os
import queue
import re
import resource
import socket
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Protocol, TypedDict
from urllib.parse import parse_qsl, urlsplit, urlunsplit

import httpx2
import openai

from cappy.errors import ConfigError, quote
from cappy.redaction import has_secret, redact_address, register_secret
from cappy.sampling.endpoint.limits import MAX_ANSWER_BYTES, MAX_ERROR_BYTES, pause

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
            why = getattr(error, "strerror", None) or "it is not a text"
            raise ConfigError(f"{source}: {quote(path)} cannot be read ({why}); mount the key there") from None
        if not key:
            raise ConfigError(f"{source}: {quote(path)} is empty; mount the key there")
    if not all(33 <= ord(character) <= 126 for character in key):
        raise ConfigError(f"{source}: holds white space or characters beyond ASCII inside the key; set the key alone")
    register_secret(key)
    return key or NO_KEY


def refuse_secrets(url: str) -> None:
    """ConfigError, without the secret, where an address carries one: specs stand in manifests and logs."""
    if has_secret(url):
        raise ConfigError(
            f"openai: the address {redact_address(url)} carries a name, a password or a key; "
            f"take it out of the spec and set {KEY_VARIABLE}"
        )


_OPERATIONS = ("/chat/completions", "/completions", "/models")
_BEGINNING_OF_JWT = "eyJ"
"""A token of Microsoft Entra is a JWT, which goes where OpenAI's keys go."""


def base_address(url: str) -> str:
    """The address that paths are joined to: no slash or operation at the end of its path, `/v1` where it has none.
    Paths go before the query, which every request keeps: https://host/d?v=1 -> https://host/d/chat/completions?v=1.
    """
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


MAX_BYTES = "cappy.max_bytes"
"""Extension of a request: how many bytes its answer may have, decoded."""
TICK_SECONDS = 0.25
_STEP = 65_536
_GZIP_OR_ZLIB = 47


class RefusedAnswerError(httpx2.DecodingError):
    """An answer that is not read to its end: too large, or in an encoding that was not requested."""


class _NetworkStream(Protocol):
    """What is used of an open connection of the HTTP client."""

    def get_extra_info(self, info: str) -> object: ...


class ClientSettings(TypedDict):
    """Keyword arguments of a client of httpx2."""

    follow_redirects: bool
    cookies: CookieJar
    headers: dict[str, str]
    event_hooks: dict[str, list[Callable[..., object]]]


class Connection:
    """The newest connection of a synchronous client that asks one thing at a time, which can be ended by force.

    The timeouts of HTTP clients begin anew with every byte, so a server that sends one a second is never late.
    """

    def __init__(self) -> None:
        self._stream: _NetworkStream | None = None
        self.max_bytes = MAX_ANSWER_BYTES
        self.due = float("inf")
        self.late = False

    def follow(self, request: httpx2.Request) -> None:
        """A hook for requests: notes what they open."""
        request.extensions["trace"] = self._trace

    def _trace(self, event: str, details: Mapping[str, "_NetworkStream"]) -> None:
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            self._stream = details["return_value"]

    def end(self) -> None:
        """Ends whatever the client reads or writes now, in any thread."""
        self.late = True
        plain = self._stream.get_extra_info("socket") if self._stream is not None else None
        if isinstance(plain, socket.socket):
            with contextlib.suppress(OSError):
                # The plain one, for that of TLS would first say farewell.
                socket.socket.shutdown(plain, socket.SHUT_RDWR)


class Deadlines:
    """Ends connections whose request takes longer than its time in all; one thread for any number of them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._connections: set[Connection] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def within(self, seconds: float, connection: Connection) -> Iterator[None]:
        """Ends the connection where the block takes longer; its `late` says so then."""
        connection.late = False
        connection.due = self._clock() + seconds
        with self._lock:
            self._connections.add(connection)
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="deadlines", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._connections.discard(connection)

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(TICK_SECONDS):
            now = self._clock()
            with self._lock:
                for connection in self._connections:
                    if connection.due < now:
                        connection.end()


def settings(connection: Connection) -> ClientSettings:
    """Settings of a synchronous client, which asks one thing at a time, over a connection that can be ended.

    Its answers have at most `connection.max_bytes` bytes, decoded.
    """

    def check_size(response: httpx2.Response) -> None:
        body = _body(response, connection.max_bytes)
        stream = response.stream
        assert isinstance(stream, httpx2.SyncByteStream)  # noqa: S101 (the client is synchronous)
        response.stream = _Stream(stream, body)

    return _settings({"request": [connection.follow], "response": [check_size]})


def async_settings() -> ClientSettings:
    """Settings of an asynchronous client; a request says in its extension `MAX_BYTES` how large its answer may be."""

    async def check_size(response: httpx2.Response) -> None:
        body = _body(response, int(response.request.extensions.get(MAX_BYTES, MAX_ANSWER_BYTES)))
        stream = response.stream
        assert isinstance(stream, httpx2.AsyncByteStream)  # noqa: S101 (the client is asynchronous)
        response.stream = _AsyncStream(stream, body)

    return _settings({"response": [check_size]})


def max_connections() -> int:
    """How many connections a client may hold: a third of the files that this process may open, 16 to 4096."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 4096 if soft == resource.RLIM_INFINITY else max(16, min(4096, soft // 3))


def _settings(hooks: dict[str, list[Callable[..., object]]]) -> ClientSettings:
    return {
        "follow_redirects": False,
        "cookies": _NoCookies(),
        "headers": {"Accept-Encoding": "gzip"},
        "event_hooks": hooks,
    }


class _NoCookies(CookieJar):
    """Keeps no cookies: one caller's session must not be sent with another caller's key."""

    def extract_cookies(self, response: object, request: object) -> None:
        """Nothing."""


class _Body:
    """Counts and decodes the chunks of one body."""

    def __init__(self, encoding: str, most: int) -> None:
        self._most = most
        self._received = self._decoded = 0
        self._inflate = None if encoding in ("", "identity") else zlib.decompressobj(_GZIP_OR_ZLIB)

    def decode(self, chunk: bytes) -> Iterator[bytes]:
        """The chunk, decoded in steps; RefusedAnswerError once the body is too large or cannot be decoded."""
        # Compressed bytes count too: a stream may be endless and decode to nothing.
        self._received += len(chunk)
        self._refuse_more_than(self._received)
        if self._inflate is None:
            yield chunk
            return
        while chunk and not self._inflate.eof:
            try:
                part = self._inflate.decompress(chunk, _STEP)
            except zlib.error as error:
                raise RefusedAnswerError(f"its answer cannot be decoded: {error}") from error
            chunk = self._inflate.unconsumed_tail
            self._decoded += len(part)
            self._refuse_more_than(self._decoded)
            yield part

    def _refuse_more_than(self, count: int) -> None:
        if count > self._most:
            raise RefusedAnswerError(f"its answer has more than {self._most:,} bytes")


def _body(response: httpx2.Response, most: int) -> _Body:
    """The reader of a response's body; RefusedAnswerError where its headers say that it will not be read."""
    most = most if response.status_code == 200 else min(most, MAX_ERROR_BYTES)
    encoding = response.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise RefusedAnswerError("its answer has an encoding that was not asked for")
    announced = response.headers.get("content-length", "")
    if re.fullmatch(r"[0-9]{1,15}", announced) and int(announced) > most:
        raise RefusedAnswerError(f"its answer has more than {most:,} bytes")
    response.headers.pop("content-encoding", None)
    # A charset that the server names may be any codec of Python's, zlib's among them.
    response.encoding = "utf-8"
    return _Body(encoding, most)


class _Stream(httpx2.SyncByteStream):
    def __init__(self, stream: httpx2.SyncByteStream, body: _Body) -> None:
        self._stream = stream
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._stream:
            yield from self._body.decode(chunk)

    def close(self) -> None:
        self._stream.close()


class _AsyncStream(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream, body: _Body) -> None:
        self._stream = stream
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._stream:
            for part in self._body.decode(chunk):
                yield part

    async def aclose(self) -> None:
        await self._stream.aclose()


CONNECT_SECONDS = 10.0


class LateError(Exception):
    """The server has not answered in time, however little it has sent meanwhile."""


@dataclass(frozen=True)
class Client:
    """A client with one connection, and the seconds that an attempt may take in all."""

    inner: openai.OpenAI
    base: str
    connection: Connection
    deadlines: Deadlines
    seconds: float

    def post(self, path: str, body: Mapping[str, object], *, max_bytes: int) -> tuple[bytes, Mapping[str, str]]:
        """Body (of at most that many bytes) and headers of the answer; openai.OpenAIError or LateError if none."""
        self.connection.max_bytes = max_bytes
        failed: openai.OpenAIError | None = None
        with self.deadlines.within(self.seconds, self.connection):
            try:
                # Straight to the path: the typed methods spend as long again on reshaping a body that is right.
                answer = self.inner.post(
                    join_path(self.base, path),
                    body=dict(body),
                    cast_to=httpx2.Response,
                    options={"headers": _headers(self.base, self.inner.api_key)},
                )
            except openai.OpenAIError as error:
                failed = error
        if self.connection.late:
            # Whatever came of it: a body without a length ends where the connection was ended.
            raise LateError(f"no answer within {self.seconds:g} s") from failed
        if failed is not None:
            raise failed
        return answer.content, answer.headers


class Clients:
    """Lends a client to one thread at a time, at most `count` in all; they are made as they are needed.

    A client with many connections looks through all of them, under one lock, at every request: at 64 at a time that
    costs as much as the request itself.
    """

    def __init__(self, url: str, *, count: int, timeout: float) -> None:
        self.key = api_key()
        self._url = url
        self._seconds = timeout
        self._timeout = openai.Timeout(timeout, connect=min(CONNECT_SECONDS, timeout))
        # Reading the certificates takes longer than anything else about a client.
        self._certificates = httpx2.create_ssl_context()
        self._free = threading.BoundedSemaphore(count)
        self._idle: queue.LifoQueue[Client] = queue.LifoQueue()
        self._made: list[Client] = []
        self._deadlines = Deadlines()

    @contextlib.contextmanager
    def client(self, stop: threading.Event) -> Iterator[Client]:
        """A client for one request, once one is free; StoppedError if the run has ended by then."""
        with self._free:
            pause(0, stop)
            try:
                client = self._idle.get_nowait()
            except queue.Empty:
                client = self._new()
            try:
                yield client
            finally:
                self._idle.put(client)

    def close(self) -> None:
        """Closes all connections."""
        self._deadlines.close()
        for client in self._made:
            client.inner.close()

    def _new(self) -> Client:
        connection = Connection()
        inner = openai.OpenAI(
            base_url=self._url,
            api_key=self.key,
            # Attempts are counted, paced and paid for here, so the client makes one at a time.
            max_retries=0,
            timeout=self._timeout,
            http_client=openai.DefaultHttpxClient(
                verify=self._certificates, timeout=self._timeout, **settings(connection)
            ),
        )
        client = Client(inner, self._url, connection, self._deadlines, self._seconds)
        self._made.append(client)
        return client


def _headers(base: str, key: str) -> dict[str, str | openai.Omit]:
    """The client's own header is left out where the address wants the key in another."""
    return {"Authorization": openai.Omit(), **key_headers(base, f"Bearer {key}")}
