"""As many clients as requests may be under way, each with a connection of its own."""

import queue
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import openai

from cappy.sampling.endpoint.addresses import join_path, key_headers
from cappy.sampling.endpoint.bounded import Connection, Deadlines, settings
from cappy.sampling.endpoint.keys import api_key
from cappy.sampling.endpoint.limits import pause

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

    def post(self, path: str, body: Mapping[str, Any], *, max_bytes: int) -> tuple[bytes, Mapping[str, str]]:
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

    @contextmanager
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
