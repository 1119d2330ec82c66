"""Pinned repositories of the hub, by a guarded client of huggingface_hub: HF_ENDPOINT may name any server.

huggingface_hub names files of its cache by the ETag and the commit that a server sends, and reads lists of files page
by page without an end. Here an answer whose headers hold a path is refused, and so is one that does not end.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from cappy.errors import ConfigError, quote
from cappy.specs import Spec

MAX_PAGES = 200
"""Pages of one list of files, of which the hub sends a thousand each."""
MAX_LIST_BYTES = 64 * 2**20
"""Of an answer of the hub's API."""
ANSWER_SECONDS = 60.0
"""Without a byte, where a call sets no other time: the client's own is none."""
MAX_UNSIZED_BYTES = 2**30
"""Of a file whose size the server does not state: those of large files are stated."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAMES = ("ETag", "X-Linked-ETag", "X-Repo-Commit", "X-Xet-Hash")


class _Stream(Protocol):
    def __iter__(self) -> Iterator[bytes]: ...

    def close(self) -> None: ...


class _Request(Protocol):
    url: object


class _Response(Protocol):
    """What is used of an answer of huggingface_hub's HTTP library."""

    headers: Mapping[str, str]
    links: Mapping[str, object]
    request: _Request
    stream: _Stream


class _Client(Protocol):
    """What is used of its client."""

    timeout: float
    event_hooks: Mapping[str, Sequence[Callable[[_Response], None]]]


def guard_client() -> None:
    """Gives huggingface_hub a client that raises ValueError for an answer that a hub would not send."""
    from huggingface_hub import set_client_factory

    set_client_factory(_guarded_client)


def _guarded_client() -> _Client:
    from huggingface_hub.utils._http import default_client_factory

    client: _Client = default_client_factory()
    pages = count(1)

    def check(response: _Response) -> None:
        for name in _NAMES:
            value = response.headers.get(name, "").removeprefix("W/")
            if "/" in value or "\\" in value or value.strip('"') in (".", ".."):
                raise ValueError(f"its {name} is a path, not a name")
        path = urlsplit(str(response.request.url)).path
        if path.startswith("/api/"):
            if "next" in response.links and next(pages) > MAX_PAGES:
                raise ValueError(f"its list of files has more than {MAX_PAGES} pages")
            response.stream = _limit_bytes(response.stream, MAX_LIST_BYTES)
        elif "Content-Length" not in response.headers:
            response.stream = _limit_bytes(response.stream, MAX_UNSIZED_BYTES)

    client.timeout = ANSWER_SECONDS
    hooks = client.event_hooks
    client.event_hooks = {**hooks, "response": [*hooks.get("response", ()), check]}
    return client


def _limit_bytes(stream: _Stream, most: int) -> _Stream:
    """The bytes of a stream, up to so many: then ValueError."""
    # The class of huggingface_hub's own HTTP library, whichever that is.
    base = next(kind for kind in type(stream).__mro__ if kind.__name__ == "SyncByteStream")

    class LimitedStream(base):  # type: ignore[misc, valid-type] # known when it runs
        def __iter__(self) -> Iterator[bytes]:
            left = most
            for chunk in stream:
                left -= len(chunk)
                if left < 0:
                    raise ValueError(f"its answer has more than {most:,} bytes")
                yield chunk

        def close(self) -> None:
            stream.close()

    return LimitedStream()


def hub_folder(spec: Spec, *, also: Sequence[str] = ()) -> Path:
    """Downloads a pinned repository, safetensors, tokenizer and `also` alone; ConfigError if it cannot be had."""
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", *also]
    guard_client()
    try:
        commit = _commit(spec)
        folder = Path(snapshot_download(spec.name, revision=commit, allow_patterns=wanted))
    except ConfigError:
        raise
    except Exception as error:  # whatever the client raises over an answer: it has a dozen kinds, of three libraries
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{spec.text}: cannot be had from the hub ({quote(reason, 100)}); check name, revision and network"
        ) from error
    # The hub answers a name of seven or more hexadecimal digits with a branch of that name, which can move.
    if not folder.name.startswith(spec.revision):
        raise _no_commit(spec, folder.name)
    return folder


def _commit(spec: Spec) -> str:
    """The whole hash of a shortened commit; as it stands where the hub is not asked."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode

    if _COMMIT.fullmatch(spec.revision) or is_offline_mode():
        return spec.revision
    commit = str(HfApi().model_info(spec.name, revision=spec.revision).sha)
    if not _COMMIT.fullmatch(commit) or not commit.startswith(spec.revision):
        raise _no_commit(spec, commit)
    return commit


def _no_commit(spec: Spec, commit: str) -> ConfigError:
    return ConfigError(f"{spec.text}: is not a commit but a name of {quote(commit, 50)}; give the whole commit hash")
