"""Downloads pinned repositories from the Hugging Face hub, through a client that checks every response.

HF_ENDPOINT may point at any server. huggingface_hub names its cache files by the ETag and the commit that a server
sends, and follows pages of a file list without limit. This client rejects headers that contain a path, and responses
that are too long.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from itertools import count
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from cappy.errors import ConfigError, quote
from cappy.specs import Spec

MAX_PAGES = 200
"""Maximum pages of one list of files; the hub sends a thousand files per page."""
MAX_LIST_BYTES = 64 * 2**20
"""Size limit of a response of the hub's API."""
READ_TIMEOUT_SECONDS = 60.0
"""Maximum wait for the next bytes if a call sets no timeout: the client has none by default."""
MAX_UNSIZED_BYTES = 2**30
"""Size limit of a file without a Content-Length: the hub states the size of large files."""

PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
"""Files of a model that are downloaded."""
CONFIG_FILES = ("config.json", "modules.json", "config_sentence_transformers.json")
"""Files that say what a model is."""
CHECK_SECONDS = 4.0
"""Time limit of the request of `check_repository`."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME_HEADERS = ("ETag", "X-Linked-ETag", "X-Repo-Commit", "X-Xet-Hash")


class _Stream(Protocol):
    def __iter__(self) -> Iterator[bytes]: ...

    def close(self) -> None: ...


class _Request(Protocol):
    url: object


class _Response(Protocol):
    """The part of a response of huggingface_hub's HTTP library that is used here."""

    headers: Mapping[str, str]
    links: Mapping[str, object]
    request: _Request
    stream: _Stream


class _Client(Protocol):
    """The part of its HTTP client that is used here."""

    timeout: float
    event_hooks: Mapping[str, Sequence[Callable[[_Response], None]]]


def guard_client() -> None:
    """Makes huggingface_hub use a client that raises ValueError for a response that a real hub would not send."""
    from huggingface_hub import set_client_factory

    set_client_factory(_guarded_client)


def _guarded_client() -> _Client:
    from huggingface_hub.utils._http import default_client_factory

    client: _Client = default_client_factory()
    pages = count(1)

    def check(response: _Response) -> None:
        for name in _NAME_HEADERS:
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

    client.timeout = READ_TIMEOUT_SECONDS
    hooks = client.event_hooks
    client.event_hooks = {**hooks, "response": [*hooks.get("response", ()), check]}
    return client


def _limit_bytes(stream: _Stream, max_bytes: int) -> _Stream:
    """Wraps the stream so that it raises ValueError after `max_bytes`."""
    # The class of the HTTP library that huggingface_hub uses.
    base = next(cls for cls in type(stream).__mro__ if cls.__name__ == "SyncByteStream")

    class LimitedStream(base):  # type: ignore[misc, valid-type] # known at run time
        def __iter__(self) -> Iterator[bytes]:
            remaining = max_bytes
            for chunk in stream:
                remaining -= len(chunk)
                if remaining < 0:
                    raise ValueError(f"its response has more than {max_bytes:,} bytes")
                yield chunk

        def close(self) -> None:
            stream.close()

    return LimitedStream()


def hub_folder(spec: Spec, *, extra_patterns: Sequence[str] = ()) -> Path:
    """Downloads the weights (safetensors), the tokenizer and `extra_patterns` of a pinned repository.

    Returns the folder in the hub's cache. Raises ConfigError if the download fails, or if the revision is not a commit.
    """
    from huggingface_hub import snapshot_download

    patterns = [*PATTERNS, *extra_patterns]
    guard_client()
    try:
        commit = _resolve_commit(spec)
        folder = Path(snapshot_download(spec.name, revision=commit, allow_patterns=patterns))
    except ConfigError:
        raise
    except Exception as error:  # The client raises a dozen types of errors, from three libraries.
        raise _download_error(spec, error) from error
    # Seven or more hexadecimal digits may also be the name of a branch, which can move.
    if not folder.name.startswith(spec.revision):
        raise _revision_error(spec, folder.name)
    return folder


def check_repository(spec: Spec) -> int:
    """Bytes that `hub_folder` would download; 0 if the commit is in the cache.

    Sends at most two small requests. Raises ConfigError if the hub does not have the repository and commit, does not
    allow this user to read it or does not answer, or if the repository has no safetensors weights.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    guard_client()
    try:
        if _COMMIT.fullmatch(spec.revision):
            with contextlib.suppress(LocalEntryNotFoundError):
                snapshot_download(spec.name, revision=spec.revision, local_files_only=True)
                return 0
        info = HfApi().model_info(spec.name, revision=spec.revision, files_metadata=True, timeout=CHECK_SECONDS)
        if info.gated:
            HfApi().auth_check(spec.name)
    except Exception as error:
        raise _download_error(spec, error) from error
    if not str(info.sha).startswith(spec.revision):
        raise _revision_error(spec, str(info.sha))
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    if not any(name.endswith(".safetensors") for name in sizes):
        raise ConfigError(
            f"{spec.text}: has no safetensors weights; choose another revision, or convert a published scorer with "
            "cappy convert"
        )
    return sum(size for name, size in sizes.items() if any(fnmatch(name, pattern) for pattern in PATTERNS))


def config_folder(spec: Spec) -> Path:
    """Downloads the small files that describe a pinned repository's model, and returns their folder in the cache."""
    from huggingface_hub import snapshot_download

    guard_client()
    try:
        return Path(snapshot_download(spec.name, revision=_resolve_commit(spec), allow_patterns=list(CONFIG_FILES)))
    except ConfigError:
        raise
    except Exception as error:
        raise _download_error(spec, error) from error


def _download_error(spec: Spec, error: Exception) -> ConfigError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ConfigError(
        f"{spec.text}: cannot be downloaded from the hub ({quote(reason, 100)}); check name, revision and network"
    )


def _resolve_commit(spec: Spec) -> str:
    """The full hash of the spec's commit, which may be abbreviated; the revision itself when offline."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode

    if _COMMIT.fullmatch(spec.revision) or is_offline_mode():
        return spec.revision
    commit = str(HfApi().model_info(spec.name, revision=spec.revision).sha)
    if not _COMMIT.fullmatch(commit) or not commit.startswith(spec.revision):
        raise _revision_error(spec, commit)
    return commit


def _revision_error(spec: Spec, commit: str) -> ConfigError:
    return ConfigError(
        f"{spec.text}: is a branch or a tag (now at {quote(commit, 50)}), not a commit; give the whole commit hash"
    )
