"""A fetched folder holds the known files or does not exist. The server is a real one, of the standard library."""

import hashlib
import io
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from wording import raises_naming

from cappy.errors import ConfigError, FolderError
from cappy.preparation.templates import fetch, load_hashes, load_templates

ROOT = "promptsource-main/promptsource/templates/"
FILES = {
    "imdb/templates.yaml": b"templates: {1: {name: a, jinja: 'x ||| y'}}\n",
    "super_glue/rte/templates.yaml": b"templates: {1: {name: b, jinja: 'x ||| y'}}\n",
}
HASHES = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}

Serve = Callable[..., str]


def packed(members: Mapping[str, bytes | str]) -> bytes:
    """A tar.gz of files, and of links where a text says where they point."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def repository(**changes: bytes) -> dict[str, bytes | str]:
    members: dict[str, bytes | str] = {"promptsource-main/README.md": b"read me"}
    return members | {ROOT + name: content for name, content in (FILES | changes).items()}


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """serve(content, status=200): the address of a server that answers with these bytes."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers = []

    def serving(content: bytes, status: int = 200) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}/main.tar.gz"

    yield serving
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_known_files_and_no_others_are_written(serve: Serve, tmp_path: Path) -> None:
    members = repository(**{"new/templates.yaml": b"templates: {}", "imdb/notes.txt": b"notes"})
    assert fetch(tmp_path / "deep/templates", url=serve(packed(members)), hashes=HASHES) == 2
    result = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()}
    assert result == {f"deep/templates/{name}" for name in FILES}
    assert [template.name for template in load_templates(tmp_path / "deep/templates", "super_glue/rte")] == ["b"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (packed(repository(**{"imdb/templates.yaml": b"templates: {1: {name: evil, jinja: '||| y'}}\n"})), "sha256"),
        (packed({ROOT + "imdb/templates.yaml": FILES["imdb/templates.yaml"]}), "has no super_glue/rte"),
        (packed(repository() | {ROOT + "imdb/templates.yaml": "/etc/passwd"}), "has no imdb"),
        (packed(repository() | {ROOT + "../../../../evil": b"x"}), "out of the archive"),
        (packed(repository() | {"/etc/evil": b"x"}), "out of the archive"),
        (packed(repository())[:-30], "is not a tar.gz"),
        (b"<html>", "is not a tar.gz"),
        (packed(repository() | {"promptsource-main/zeros": bytes(2**26)}), "unpacks to more than"),
    ],
    ids=["tampered", "missing", "link", "up", "absolute", "cut short", "no archive", "bomb"],
)
def test_another_archive_is_refused_and_nothing_is_written(
    serve: Serve, tmp_path: Path, content: bytes, reason: str
) -> None:
    with pytest.raises(FolderError, match=reason):
        fetch(tmp_path / "templates", url=serve(content), hashes=HASHES)
    assert not list(tmp_path.iterdir())


def test_an_address_that_gives_nothing_is_named(serve: Serve, tmp_path: Path) -> None:
    url = serve(b"gone", status=404)
    with raises_naming(ConfigError, f"{url}: ", "404"):
        fetch(tmp_path / "templates", url=url, hashes=HASHES)
    with raises_naming(ConfigError, "file:///etc/passwd", "address"):
        fetch(tmp_path / "templates", url="file:///etc/passwd", hashes=HASHES)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "templates").mkdir()
    with raises_naming(ConfigError, str(tmp_path / "templates"), "already"):
        fetch(tmp_path / "templates", hashes=HASHES)


def test_the_known_hashes_are_those_of_the_files_that_the_tests_read(real_templates: Path) -> None:
    files = sorted(real_templates.rglob("templates.yaml"))
    result = {
        file.relative_to(real_templates).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }
    assert result == load_hashes()
