"""What a hostile hub may not do: each download is a process of its own, because the address is read once."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from local_server import handled_by
from wording import assert_names

COMMIT = "ab" * 20
SCRIPT = """
import sys
from cappy.errors import ConfigError
from cappy.hub_client import hub_folder
from cappy.specs import parse_spec
try:
    print(hub_folder(parse_spec(sys.argv[1])))
except ConfigError as error:
    print("ConfigError", error)
"""
CHECK = SCRIPT.replace("hub_folder", "check_repository")
NEXT = '<{address}/api/models/o/m/tree/main?cursor=1>; rel="next"'
Answer = tuple[bytes, Mapping[str, str]]


def hub(answer: Callable[[str], Answer | None]) -> type[BaseHTTPRequestHandler]:
    """A hub of one file, config.json, unless `answer` has another answer to a path."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            body, headers = answer(self.path) or self.usual()
            self.send_response(200)
            for name, value in {"ETag": '"e"', "X-Repo-Commit": COMMIT, **headers}.items():
                self.send_header(name, value.replace("{address}", f"http://{self.headers['Host']}"))
            if "Transfer-Encoding" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def usual(self) -> Answer:
            if "/tree/" in self.path:
                return json.dumps([{"type": "file", "path": "config.json", "size": 2, "oid": "0" * 40}]).encode(), {}
            return (json.dumps({"id": "o/m", "sha": COMMIT}).encode() if "/api/" in self.path else b"{}"), {}

    return Handler


def downloaded(
    folder: Path, answer: Callable[[str], Answer | None], revision: str = COMMIT, script: str = SCRIPT
) -> str:
    with handled_by(hub(answer)) as address:
        done = subprocess.run(
            [sys.executable, "-c", script, f"hub:o/m@{revision}"],
            env={**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(folder / "hub"), "HF_HUB_DISABLE_XET": "1"},
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("revision", [COMMIT, COMMIT[:12]])
def test_a_hub_as_it_should_be_is_downloaded(tmp_path: Path, revision: str) -> None:
    assert (Path(downloaded(tmp_path, lambda path: None, revision)) / "config.json").read_bytes() == b"{}"


@pytest.mark.parametrize("etag", ["../../../../outside", "{folder}/outside", "..\\outside"])
def test_no_header_of_a_hub_names_a_file_outside_its_cache(tmp_path: Path, etag: str) -> None:
    headers = {"ETag": f'"{etag.format(folder=tmp_path)}"'}
    said = downloaded(tmp_path, lambda path: None if "/api/" in path else (b"{}", headers))
    assert said.startswith(f"ConfigError hub:o/m@{COMMIT}: ")
    assert "ETag is a path" in said
    assert not list(tmp_path.rglob("outside*"))


def test_a_commit_that_is_a_path_is_refused(tmp_path: Path) -> None:
    body = json.dumps({"id": "o/m", "sha": f"../../../../{COMMIT}"}).encode()
    said = downloaded(tmp_path, lambda path: (body, {}) if "/revision/" in path else None, COMMIT[:12])
    assert_names(said, "commit", "'../../../../abab")
    assert not list(tmp_path.rglob("snapshots"))


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a": 1}', b'["a"]', b"[1", b""])
def test_a_list_of_files_that_is_none_is_one_line(tmp_path: Path, body: bytes) -> None:
    said = downloaded(tmp_path, lambda path: (body, {}) if "/tree/" in path else None)
    assert said.startswith(f"ConfigError hub:o/m@{COMMIT}: ")
    assert said.count("\n") == 0


def test_a_list_of_files_that_never_ends_is_refused(tmp_path: Path) -> None:
    said = downloaded(tmp_path, lambda path: (b"[]", {"Link": NEXT}) if "/tree/" in path else None)
    assert_names(said, "list of files", "200 pages")


def test_a_large_answer_of_the_api_is_refused(tmp_path: Path) -> None:
    said = downloaded(tmp_path, lambda path: (b" " * 65 * 2**20, {}) if "/tree/" in path else None)
    assert "67,108,864 bytes" in said


def test_a_check_asks_for_the_size_of_what_would_be_downloaded_and_not_for_files(tmp_path: Path) -> None:
    paths: list[str] = []
    siblings = [
        {"rfilename": "model.safetensors", "size": 3000},
        {"rfilename": "config.json", "size": 20},
        {"rfilename": "pytorch_model.bin", "size": 3000},
    ]

    def answer(path: str) -> Answer | None:
        if "/models/" in path:  # huggingface_hub asks for lists of its own.
            paths.append(path)
        return json.dumps({"id": "o/m", "sha": COMMIT, "siblings": siblings}).encode(), {}

    assert downloaded(tmp_path, answer, script=CHECK) == "3020"
    assert len(paths) == 1
    assert "/resolve/" not in paths[0]
    siblings[0]["rfilename"] = "model.h5"
    assert_names(downloaded(tmp_path, answer, script=CHECK), "no safetensors weights", "cappy convert")


def test_a_check_of_a_commit_in_the_cache_asks_nothing_and_one_of_a_branch_refuses_it(tmp_path: Path) -> None:
    downloaded(tmp_path, lambda path: None)
    assert downloaded(tmp_path, lambda path: (b"not asked", {}), script=CHECK) == "0"
    branch = json.dumps({"id": "o/m", "sha": "cd" * 20, "siblings": [{"rfilename": "a.safetensors"}]}).encode()
    said = downloaded(tmp_path, lambda path: (branch, {}), "abababa", script=CHECK)
    assert_names(said, "is a branch or a tag", "cdcd")
