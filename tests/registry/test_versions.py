"""Versions: found by what a person types, downloaded once, never trusted unseen; MLflow away is one quick line."""

import http.server
import shutil
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from wording import raises_naming

from cappy import registry
from cappy.errors import RegistryError, UnreachableError
from cappy.records import read_manifest
from cappy.scorers import scorer_folder


def stored(env: Any, number: int = 1) -> Path:
    source = registry.resolve(f"models:/cappy/{number}", tracking_uri=env.uri).source
    return Path(source.removeprefix("file://")) / "artifacts" / "scorer"


def test_a_download_is_the_plain_folder_and_comes_once(env: Any, registered: Any) -> None:
    scorer, _ = registered("a")
    first = registry.download("models:/cappy@challenger", tracking_uri=env.uri, cache=env.folder / "models")
    assert read_manifest(first).hash == read_manifest(scorer).hash
    touched = (first / "config.json").stat().st_mtime_ns
    second = registry.download("models:/cappy/1", tracking_uri=env.uri, cache=env.folder / "models")
    assert second == first
    assert (second / "config.json").stat().st_mtime_ns == touched


def test_a_damaged_file_in_the_store_is_refused(env: Any, registered: Any) -> None:
    registered("a")
    (stored(env) / "model.safetensors").write_bytes(b"x" * 100)
    with raises_naming(RegistryError, "models:/cappy/1", "model.safetensors", "damaged"):
        registry.download("models:/cappy/1", tracking_uri=env.uri, cache=env.folder / "models")
    assert not (env.folder / "models" / read_manifest(env.folder / "a").hash).exists()


def test_files_that_the_store_does_not_give_are_unreachable_and_not_a_bad_version(env: Any, registered: Any) -> None:
    registered("a")
    shutil.rmtree(stored(env))
    with raises_naming(UnreachableError, "models:/cappy/1", "artifact store"):
        registry.download("models:/cappy/1", tracking_uri=env.uri, cache=env.folder / "models")


def test_another_scorer_under_the_versions_name_is_refused(env: Any, registered: Any) -> None:
    registered("a", 1.0)
    other, _ = registered("b", 2.0)
    for name in ("model.safetensors", "manifest.json"):
        (stored(env) / name).write_bytes((other / name).read_bytes())
    with raises_naming(RegistryError, "models:/cappy/1", read_manifest(other).hash[:12], "register"):
        registry.download("models:/cappy/1", tracking_uri=env.uri, cache=env.folder / "models")


def test_a_damaged_copy_in_the_cache_is_fetched_again(env: Any, registered: Any) -> None:
    registered("a")
    cache = env.folder / "models"
    kept = registry.download("models:/cappy/1", tracking_uri=env.uri, cache=cache)
    (kept / "config.json").write_text("damaged")
    assert (registry.download("models:/cappy/1", tracking_uri=env.uri, cache=cache) / "config.json").read_text() == "{}"


def test_what_is_missing_is_said_with_what_there_is(env: Any, registered: Any) -> None:
    with raises_naming(RegistryError, "models:/cappy@champion", "no such model", "MLFLOW_TRACKING_URI"):
        registry.resolve("models:/cappy@champion", tracking_uri=env.uri)
    registered("a")
    with raises_naming(RegistryError, "models:/cappy@champion", "challenger", "newest version: 1"):
        registry.resolve("models:/cappy@champion", tracking_uri=env.uri)
    with pytest.raises(RegistryError, match="newest version: 1"):
        registry.resolve("models:/cappy/7", tracking_uri=env.uri)


def test_a_scorer_spec_finds_the_registry_of_the_environment(
    env: Any, registered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer, _ = registered("a")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", env.uri)
    assert read_manifest(scorer_folder("models:/cappy@challenger")).hash == read_manifest(scorer).hash


def test_no_champion_is_known_where_no_database_is_yet(tmp_path: Path) -> None:
    assert registry.champion("cappy", tracking_uri=f"sqlite:///{tmp_path}/none.db") is None
    assert not (tmp_path / "none.db").exists()


def test_a_server_that_refuses_is_one_quick_line() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    _quick(f"http://127.0.0.1:{port}", "does not answer")


def test_a_server_that_never_answers_is_one_quick_line() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        _quick(f"http://127.0.0.1:{silent.getsockname()[1]}", "does not answer")


def test_a_server_that_is_no_mlflow_is_one_quick_line() -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        _quick(f"http://127.0.0.1:{server.server_address[1]}", "MLflow failed")
    finally:
        server.shutdown()
        server.server_close()


def test_a_database_that_cannot_be_opened_is_one_quick_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    _quick(f"sqlite:///{tmp_path}/file/mlflow.db", "cannot be opened")
    (tmp_path / "other.db").write_text("no database, but long enough to be read as one" * 100)
    _quick(f"sqlite:///{tmp_path}/other.db", "cannot be opened")


def test_a_password_in_the_address_is_not_reported() -> None:
    with pytest.raises(RegistryError) as caught:
        registry.resolve("models:/cappy/1", tracking_uri="http://anna:secret@127.0.0.1:9")
    assert "secret" not in str(caught.value)


def _quick(uri: str, words: str) -> None:
    started = time.monotonic()
    with pytest.raises(RegistryError, match=words) as caught:
        registry.resolve("models:/cappy/1", tracking_uri=uri)
    assert time.monotonic() - started < 8
    assert "\n" not in str(caught.value)
    assert uri in str(caught.value)


@pytest.mark.parametrize("tag", ["cappy.manifest", "cappy.calibration"])
@pytest.mark.parametrize("absolute", [True, False])
def test_a_tag_never_chooses_which_folder_is_deleted(env: Any, registered: Any, tag: str, absolute: bool) -> None:
    registered("a")
    kept, cache = env.folder / "kept", env.folder / "models"
    kept.mkdir()
    (kept / "notes.txt").write_text("mine")
    manifest = read_manifest(env.folder / "a").hash
    (cache / f"{manifest}-").mkdir(parents=True)
    named = str(kept) if absolute else "../kept" if tag == "cappy.manifest" else "/../../kept"
    _tag(env, tag, named)
    with pytest.raises(RegistryError, match=r"models:/cappy/1: "):
        registry.download("models:/cappy/1", tracking_uri=env.uri, cache=cache)
    assert (kept / "notes.txt").read_text() == "mine"


def _tag(env: Any, name: str, value: str) -> None:
    from cappy.registry.client import connect

    with connect(env.uri) as client:
        client.set_model_version_tag("cappy", "1", name, value)


@pytest.mark.parametrize(
    "form", ["http://{}/api/2.0/mlflow-artifacts/artifacts/0/model", "mlflow-artifacts://{}/0/model"]
)
def test_no_other_server_gets_the_password_of_mlflow(
    env: Any, registered: Any, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from cappy.registry import versions

    registered("a")
    asked: list[str] = []

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers.get("Authorization", ""))
            self.send_error(404)

    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = form.format(f"127.0.0.1:{server.server_address[1]}")
        result = replace(versions.resolve("models:/cappy/1", tracking_uri=env.uri), source=source)
        monkeypatch.setattr(versions, "resolve", lambda *_, **__: result)
        with raises_naming(RegistryError, "models:/cappy/1", "other than MLflow", versions.ARTIFACT_HOSTS):
            registry.download("models:/cappy/1", tracking_uri=env.uri, cache=env.folder / "models")
        assert asked == []
        monkeypatch.setenv(versions.ARTIFACT_HOSTS, f"127.0.0.1:{server.server_address[1]}")
        with pytest.raises(UnreachableError):
            registry.download("models:/cappy/1", tracking_uri=env.uri, cache=env.folder / "models")
        server.shutdown()
    # Behind a SQLite file MLflow itself refuses the second form.
    assert set(asked) == ({"Bearer secret"} if form.startswith("http") else set())


def test_a_copied_version_is_downloaded_from_where_the_original_lies(env: Any, registered: Any) -> None:
    from cappy.registry.client import connect

    registered("a")
    with connect(env.uri) as client:
        copy = client.copy_model_version("models:/cappy/1", "other")
        original = client.get_model_version("cappy", "1")
        for name, value in original.tags.items():
            client.set_model_version_tag("other", copy.version, name, value)
    places = {"tracking_uri": env.uri, "cache": env.folder / "models"}
    assert registry.download("models:/other/1", **places) == registry.download("models:/cappy/1", **places)


@pytest.mark.parametrize("text", ["[1,", "{}", '{"at": 1}', "[" * 100_000])
def test_a_history_that_somebody_edited_is_one_line(env: Any, registered: Any, text: str) -> None:
    from cappy.registry.client import connect

    registered("a")
    with connect(env.uri) as client:
        client.set_registered_model_tag("cappy", "cappy.history.00000", text[:5000])
    with raises_naming(RegistryError, "models:/cappy", "cappy.history.00000", "delete the tag"):
        registry.history("cappy", tracking_uri=env.uri)
