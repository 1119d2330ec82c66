"""HTTP clients for untrusted endpoints: limits on the size and time of answers.

A body is decoded in chunks, and the request is aborted as soon as it is too large, whatever its compression. Redirects
and cookies are ignored: the key and the prompts only go to the configured address.
"""

import contextlib
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
from typing import Protocol, TypedDict

import httpx2
import openai

from cappy.sampling.endpoint.address import api_key, join_path, key_headers
from cappy.sampling.endpoint.limits import MAX_ANSWER_BYTES, MAX_ERROR_BYTES, pause

MAX_BYTES = "cappy.max_bytes"
"""Request extension: the maximum size of the decoded answer, in bytes."""
CHECK_SECONDS = 0.25
_DECODE_CHUNK = 65_536
_ZLIB_AUTO_WBITS = 47


class UnreadableResponseError(httpx2.DecodingError):
    """The response is too large, cannot be decoded, or has an encoding that was not requested."""


class _NetworkStream(Protocol):
    """The part of the HTTP client's connections that is used here."""

    def get_extra_info(self, info: str) -> object: ...


class ClientSettings(TypedDict):
    """Keyword arguments of a client of httpx2."""

    follow_redirects: bool
    cookies: CookieJar
    headers: dict[str, str]
    event_hooks: dict[str, list[Callable[..., object]]]


class Connection:
    """The current connection of a synchronous client with one request at a time; another thread can abort it.

    The timeouts of HTTP clients restart with every byte, so they do not limit the total time of a slow server.
    """

    def __init__(self) -> None:
        self._stream: _NetworkStream | None = None
        self.max_bytes = MAX_ANSWER_BYTES
        self.deadline = float("inf")
        self.timed_out = False

    def trace(self, request: httpx2.Request) -> None:
        """A request hook that records the connection that is opened."""
        request.extensions["trace"] = self._trace

    def _trace(self, event: str, details: Mapping[str, "_NetworkStream"]) -> None:
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            self._stream = details["return_value"]

    def abort(self) -> None:
        """Aborts the client's current read or write; may be called from any thread."""
        self.timed_out = True
        raw_socket = self._stream.get_extra_info("socket") if self._stream is not None else None
        if isinstance(raw_socket, socket.socket):
            with contextlib.suppress(OSError):
                # The method of the plain socket, since that of a TLS socket would first send a close message.
                socket.socket.shutdown(raw_socket, socket.SHUT_RDWR)


class Deadlines:
    """Aborts connections whose request exceeds its total time; one thread watches all of them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._connections: set[Connection] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def within(self, seconds: float, connection: Connection) -> Iterator[None]:
        """Aborts the connection, and sets `timed_out`, if the block takes longer than this."""
        connection.timed_out = False
        connection.deadline = self._clock() + seconds
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
        """Stops the thread."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(CHECK_SECONDS):
            now = self._clock()
            with self._lock:
                for connection in self._connections:
                    if connection.deadline < now:
                        connection.abort()


def sync_settings(connection: Connection) -> ClientSettings:
    """Settings of a synchronous client with one request at a time, over a connection that can be aborted.

    Its decoded answers are limited to `connection.max_bytes`.
    """

    def check_size(response: httpx2.Response) -> None:
        body = _body_decoder(response, connection.max_bytes)
        stream = response.stream
        assert isinstance(stream, httpx2.SyncByteStream)  # noqa: S101 (the client is synchronous)
        response.stream = _Stream(stream, body)

    return _common_settings({"request": [connection.trace], "response": [check_size]})


def async_settings() -> ClientSettings:
    """Settings of an asynchronous client; the request extension `MAX_BYTES` limits its decoded answer."""

    async def check_size(response: httpx2.Response) -> None:
        body = _body_decoder(response, int(response.request.extensions.get(MAX_BYTES, MAX_ANSWER_BYTES)))
        stream = response.stream
        assert isinstance(stream, httpx2.AsyncByteStream)  # noqa: S101 (the client is asynchronous)
        response.stream = _AsyncStream(stream, body)

    return _common_settings({"response": [check_size]})


def max_connections() -> int:
    """Maximum connections of a client: a third of this process's limit on open files, from 16 to 4096."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 4096 if soft == resource.RLIM_INFINITY else max(16, min(4096, soft // 3))


def _common_settings(hooks: dict[str, list[Callable[..., object]]]) -> ClientSettings:
    return {
        "follow_redirects": False,
        "cookies": _NoCookies(),
        "headers": {"Accept-Encoding": "gzip"},
        "event_hooks": hooks,
    }


class _NoCookies(CookieJar):
    """A cookie jar that stays empty: one caller's session must not be sent with another caller's key."""

    def extract_cookies(self, response: object, request: object) -> None:
        """Ignores the cookies."""


class _BodyDecoder:
    """Decodes the chunks of one body and limits its size."""

    def __init__(self, encoding: str, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._received = self._decoded = 0
        self._inflate = None if encoding in ("", "identity") else zlib.decompressobj(_ZLIB_AUTO_WBITS)

    def decode(self, chunk: bytes) -> Iterator[bytes]:
        """Yields the decoded chunk in pieces; raises UnreadableResponseError if the body is too large or invalid."""
        # Compressed bytes count too, because an endless stream may decode to nothing.
        self._received += len(chunk)
        self._check_size(self._received)
        if self._inflate is None:
            yield chunk
            return
        while chunk and not self._inflate.eof:
            try:
                part = self._inflate.decompress(chunk, _DECODE_CHUNK)
            except zlib.error as error:
                raise UnreadableResponseError(f"the answer cannot be decoded: {error}") from error
            chunk = self._inflate.unconsumed_tail
            self._decoded += len(part)
            self._check_size(self._decoded)
            yield part

    def _check_size(self, count: int) -> None:
        if count > self._max_bytes:
            raise UnreadableResponseError(f"the answer has more than {self._max_bytes:,} bytes")


def _body_decoder(response: httpx2.Response, max_bytes: int) -> _BodyDecoder:
    """The decoder for a response's body; raises UnreadableResponseError if its headers show that it is unreadable."""
    max_bytes = max_bytes if response.status_code == 200 else min(max_bytes, MAX_ERROR_BYTES)
    encoding = response.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise UnreadableResponseError("the answer has a content encoding that was not requested")
    content_length = response.headers.get("content-length", "")
    if re.fullmatch(r"[0-9]{1,15}", content_length) and int(content_length) > max_bytes:
        raise UnreadableResponseError(f"the answer has more than {max_bytes:,} bytes")
    response.headers.pop("content-encoding", None)
    # The server could name any of Python's codecs as charset, including zlib.
    response.encoding = "utf-8"
    return _BodyDecoder(encoding, max_bytes)


class _Stream(httpx2.SyncByteStream):
    def __init__(self, stream: httpx2.SyncByteStream, body: _BodyDecoder) -> None:
        self._stream = stream
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._stream:
            yield from self._body.decode(chunk)

    def close(self) -> None:
        self._stream.close()


class _AsyncStream(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream, body: _BodyDecoder) -> None:
        self._stream = stream
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._stream:
            for part in self._body.decode(chunk):
                yield part

    async def aclose(self) -> None:
        await self._stream.aclose()


CONNECT_SECONDS = 10.0


class DeadlineExceededError(Exception):
    """The server did not send a complete answer in time."""


@dataclass(frozen=True)
class EndpointClient:
    """A client with one connection, and the maximum seconds of an attempt."""

    inner: openai.OpenAI
    base: str
    connection: Connection
    deadlines: Deadlines
    seconds: float

    def post(self, path: str, body: Mapping[str, object], *, max_bytes: int) -> tuple[bytes, Mapping[str, str]]:
        """Sends the request; returns body (at most `max_bytes`) and headers of the answer.

        Raises openai.OpenAIError or DeadlineExceededError if there is none.
        """
        # The typed methods would take twice as long, because they also transform a body that is already right.
        return self._send(
            lambda: self.inner.post(
                join_path(self.base, path),
                body=dict(body),
                cast_to=httpx2.Response,
                options={"headers": _headers(self.base, self.inner.api_key)},
            ),
            max_bytes,
        )

    def get(self, path: str, *, max_bytes: int) -> bytes:
        """The body of the answer to a GET request; the limits and errors are those of `post`."""
        body, _ = self._send(
            lambda: self.inner.get(
                join_path(self.base, path),
                cast_to=httpx2.Response,
                options={"headers": _headers(self.base, self.inner.api_key)},
            ),
            max_bytes,
        )
        return body

    def _send(self, request: Callable[[], httpx2.Response], max_bytes: int) -> tuple[bytes, Mapping[str, str]]:
        self.connection.max_bytes = max_bytes
        api_error: openai.OpenAIError | None = None
        with self.deadlines.within(self.seconds, self.connection):
            try:
                answer = request()
            except openai.OpenAIError as error:
                api_error = error
        if self.connection.timed_out:
            # Even if there is an answer: a body without a length seems complete when its connection is aborted.
            raise DeadlineExceededError(f"no answer within {self.seconds:g} s") from api_error
        if api_error is not None:
            raise api_error
        return answer.content, answer.headers


class Clients:
    """A pool of at most `count` clients, each used by one thread at a time and created when needed.

    One client with many connections would search all of them, under one lock, for every request: with 64 concurrent
    requests that takes as long as the request itself.
    """

    def __init__(self, url: str, *, count: int, timeout: float) -> None:
        self.key = api_key()
        self._url = url
        self._seconds = timeout
        self._timeout = openai.Timeout(timeout, connect=min(CONNECT_SECONDS, timeout))
        # Shared, because reading the certificates takes most of the time of creating a client.
        self._certificates = httpx2.create_ssl_context()
        self._slots = threading.BoundedSemaphore(count)
        self._idle: queue.LifoQueue[EndpointClient] = queue.LifoQueue()
        self._clients: list[EndpointClient] = []
        self._deadlines = Deadlines()

    @contextlib.contextmanager
    def client(self, stop: threading.Event) -> Iterator[EndpointClient]:
        """Waits for a free client and yields it for one request. Raises StoppedError if the run was stopped."""
        with self._slots:
            pause(0, stop)
            try:
                client = self._idle.get_nowait()
            except queue.Empty:
                client = self._create()
            try:
                yield client
            finally:
                self._idle.put(client)

    def close(self) -> None:
        """Closes all connections."""
        self._deadlines.close()
        for client in self._clients:
            client.inner.close()

    def _create(self) -> EndpointClient:
        connection = Connection()
        inner = openai.OpenAI(
            base_url=self._url,
            api_key=self.key,
            # Retries are made, counted and rate-limited by `RequestSender`.
            max_retries=0,
            timeout=self._timeout,
            http_client=openai.DefaultHttpxClient(
                verify=self._certificates, timeout=self._timeout, **sync_settings(connection)
            ),
        )
        client = EndpointClient(inner, self._url, connection, self._deadlines, self._seconds)
        self._clients.append(client)
        return client


def _headers(base: str, key: str) -> dict[str, str | openai.Omit]:
    """The header with the key, in place of the client's own Authorization."""
    return {"Authorization": openai.Omit(), **key_headers(base, f"Bearer {key}")}
