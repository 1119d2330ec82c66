"""As many clients as requests may be under way, each with a connection of its own."""

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
import openai

from cappy.sampling.endpoint.keys import api_key
from cappy.sampling.endpoint.limits import pause

CONNECT_SECONDS = 10.0


class Clients:
    """Lends a client to one thread at a time, at most `count` in all; they are made as they are needed.

    A client with many connections looks through all of them, under one lock, at every request: at 64 at a time that
    costs as much as the request itself.
    """

    def __init__(self, url: str, *, count: int, timeout: float) -> None:
        self.key = api_key()
        self._url = url
        self._timeout = openai.Timeout(timeout, connect=min(CONNECT_SECONDS, timeout))
        # Reading the certificates takes longer than anything else about a client.
        self._certificates = httpx2.create_ssl_context()
        self._free = threading.BoundedSemaphore(count)
        self._idle: queue.LifoQueue[openai.OpenAI] = queue.LifoQueue()
        self._made: list[openai.OpenAI] = []

    @contextmanager
    def client(self, stop: threading.Event) -> Iterator[openai.OpenAI]:
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
        for client in self._made:
            client.close()

    def _new(self) -> openai.OpenAI:
        client = openai.OpenAI(
            base_url=self._url,
            api_key=self.key,
            # Attempts are counted, paced and paid for here, so the client makes one at a time.
            max_retries=0,
            timeout=self._timeout,
            http_client=openai.DefaultHttpxClient(verify=self._certificates, timeout=self._timeout),
        )
        self._made.append(client)
        return client
