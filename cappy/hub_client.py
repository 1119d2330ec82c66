"""The client of huggingface_hub, guarded: a hub that HF_ENDPOINT names may be any server.

huggingface_hub names files of its cache by the ETag and the commit that a server sends, and reads lists of files page
by page without an end. Here an answer whose headers hold a path is refused, and so is one that does not end.
"""

from collections.abc import Iterator
from itertools import count
from typing import Any
from urllib.parse import urlsplit

MAX_PAGES = 200
"""Pages of one list of files, of which the hub sends a thousand each."""
MAX_LIST_BYTES = 64 * 2**20
"""Of an answer of the hub's API."""
ANSWER_SECONDS = 60.0
"""Without a byte, where a call sets no other time: the client's own is none."""
MAX_UNSIZED_BYTES = 2**30
"""Of a file whose size the server does not state: those of large files are stated."""

_NAMES = ("ETag", "X-Linked-ETag", "X-Repo-Commit", "X-Xet-Hash")


def guard_client() -> None:
    """Gives huggingface_hub a client that raises ValueError for an answer that a hub would not send."""
    from huggingface_hub import set_client_factory

    set_client_factory(_guarded_client)


def _guarded_client() -> Any:
    from huggingface_hub.utils._http import default_client_factory

    client, pages = default_client_factory(), count(1)

    def check(response: Any) -> None:
        for name in _NAMES:
            value = response.headers.get(name, "").removeprefix("W/")
            if "/" in value or "\\" in value or value.strip('"') in (".", ".."):
                raise ValueError(f"its {name} is a path, not a name")
        path = urlsplit(str(response.request.url)).path
        if path.startswith("/api/"):
            if "next" in response.links and next(pages) > MAX_PAGES:
                raise ValueError(f"its list of files has more than {MAX_PAGES} pages")
            response.stream = _bounded(response.stream, MAX_LIST_BYTES)
        elif "Content-Length" not in response.headers:
            response.stream = _bounded(response.stream, MAX_UNSIZED_BYTES)

    client.timeout = ANSWER_SECONDS
    hooks = client.event_hooks
    client.event_hooks = {**hooks, "response": [*hooks.get("response", ()), check]}
    return client


def _bounded(stream: Any, most: int) -> Any:
    """The bytes of a stream, up to so many: then ValueError."""
    # The class of huggingface_hub's own HTTP library, whichever that is.
    base = next(kind for kind in type(stream).__mro__ if kind.__name__ == "SyncByteStream")

    class Bounded(base):  # type: ignore[misc, valid-type] # known when it runs
        def __iter__(self) -> Iterator[bytes]:
            left = most
            for chunk in stream:
                left -= len(chunk)
                if left < 0:
                    raise ValueError(f"its answer has more than {most:,} bytes")
                yield chunk

        def close(self) -> None:
            stream.close()

    return Bounded()
