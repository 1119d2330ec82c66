"""A small fake of the hub: what its clients ask for when they stream Parquet files of a dataset at a commit."""

import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from local_server import handled_by

Files = Mapping[str, bytes]


def parquet(rows: list[dict[str, Any]]) -> bytes:
    """Rows as a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def readme(**configurations: Mapping[str, str]) -> bytes:
    """The card of a dataset with configurations: name -> split -> file."""
    lines = ["---", "configs:"]
    for name, splits in configurations.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        lines += [line for split, path in splits.items() for line in (f"  - split: {split}", f"    path: {path}")]
    return "\n".join([*lines, "---", ""]).encode()


def commit_of(files: Files) -> str:
    """The commit of a repository of these files."""
    return hashlib.sha1(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest()


@contextmanager
def serving(repositories: Mapping[str, Mapping[str, Files]]) -> Iterator[str]:
    """The address of a hub of these repositories: name -> revision -> path -> content."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            match = re.fullmatch(
                r"(/api)?/datasets/([^/]+/[^/]+)/(revision|tree|resolve)/(refs/convert/parquet|[^/]+)/?(.*)", path
            )
            revisions = repositories.get(match[2], {}) if match else {}
            at = {**revisions, **{commit_of(files): files for files in revisions.values()}}
            files = at.get(match[4]) if match else None
            if match is None or files is None:
                return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            if match[3] == "resolve":
                return self.resolve(files, match[5])
            if match[3] == "tree":
                return self.answer(200, tree(files, match[5]))
            siblings = [{"rfilename": name} for name in files]
            known = {"id": match[2], "sha": commit_of(files), "siblings": siblings, "tags": []}
            return self.answer(200, {**known, "private": False, "gated": False, "disabled": False})

        def resolve(self, files: Files, name: str) -> None:
            headers = {"ETag": f'"{commit_of(files)}"', "X-Repo-Commit": commit_of(files)}
            if name not in files:
                return self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            data = files[name]
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if asked is None:
                return self.answer(200, data, headers)
            start, end = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
            return self.answer(
                206, data[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"}
            )

        def answer(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    with handled_by(Handler) as address:
        yield address


def tree(files: Files, folder: str) -> list[dict[str, Any]]:
    """The files and folders right under a folder."""
    inside = [name for name in files if not folder or name.startswith(f"{folder}/")]
    match: dict[str, dict[str, Any]] = {}
    for name in inside:
        first, *rest = name[len(folder) :].strip("/").split("/")
        path = "/".join(filter(None, (folder, first)))
        if rest:
            match[path] = {"type": "directory", "path": path, "oid": "0" * 40}
        else:
            match[path] = {"type": "file", "path": path, "size": len(files[name]), "oid": "0" * 40}
    return list(match.values())
