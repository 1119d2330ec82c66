"""What can be said of the images without building them: pins, Dockerfiles, and an engine's refusals."""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

import engine
import images
import locks
import pytest
from wording import raises_naming

from components import TRAINER_CUDA_IMAGE, TRAINER_IMAGE, TRAINER_TPU_IMAGE, WORKER_CUDA_IMAGE, WORKER_IMAGE

DOCKER = Path(__file__).parents[2] / "docker"
LAYERS = {
    "serving": ("serving",),
    "worker": ("serving", "worker"),
    "trainer": ("serving", "worker", "trainer"),
    "trainer-tpu": ("serving", "worker", "jax-cpu"),
}
LINE = re.compile(r"([\w.-]+)==([\w.+]+) \\\n    --hash=sha256:[0-9a-f]{64}\n")


def dockerfile(name: str) -> str:
    return (DOCKER / f"{name}.Dockerfile").read_text()


def pins(path: Path) -> Mapping[str, str]:
    return {name.lower().replace("_", "-"): version for name, version in LINE.findall(path.read_text())}


def locked() -> Mapping[str, str]:
    return {name.lower().replace("_", "-"): version for name, version in locks.read_locks().items()}


@pytest.mark.parametrize("path", sorted((DOCKER / "requirements").glob("*.lock")), ids=lambda path: path.stem)
def test_every_pin_has_its_hash_and_the_version_of_the_lock(path: Path) -> None:
    comment, _, rest = path.read_text().partition("\n")
    assert comment.startswith("# ")
    assert LINE.sub("", rest) == ""
    outside = {"sbom": ("packaging",)}.get(path.stem, ())
    versions = {name: version.partition("+")[0] for name, version in pins(path).items() if name not in outside}
    assert versions == {name: locked().get(name, version) for name, version in versions.items()}


def test_every_image_has_what_its_dependencies_ask_for() -> None:
    sets = {path.stem: pins(path) for path in (DOCKER / "requirements").glob("*.lock")}
    cuda = sets["torch-cuda"].keys()
    assert sets["torch-cpu"].keys() == {"torch"} < cuda
    for layers in LAYERS.values():
        names = [name for layer in layers for name in sets[layer]]
        assert len(names) == len(set(names))
        assert cuda & set(names) == set()
    assert sets["worker"]["kfp"] == "2.17.0"
    assert "kfp" not in sets["serving"]
    assert {"jax", "optax"} <= sets["jax-cpu"].keys() < sets["jax-tpu"].keys()


@pytest.mark.parametrize("name", LAYERS)
def test_what_the_project_asks_for_is_in_the_pins_else_run_make_image_locks(name: str) -> None:
    project = tomllib.loads((DOCKER.parent / "pyproject.toml").read_text())["project"]
    extras = {"trainer": ("train",), "trainer-tpu": ("tpu",)}.get(name, ())
    wanted = [*project["dependencies"]] if name != "serving" else [*locks.SERVING]
    wanted += [
        line
        for extra in (*locks.WORKER, *extras)
        for line in project["optional-dependencies"][extra]
        if name != "serving"
    ]
    names = {re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in wanted}
    have = {
        result for layer in ("torch-cpu", *LAYERS[name]) for result in pins(DOCKER / "requirements" / f"{layer}.lock")
    }
    assert names - have == set()


def test_what_all_images_share_is_written_once_and_the_same_everywhere() -> None:
    first = {name: dockerfile(name).partition("# End of the shared part.") for name in images.IMAGES}
    assert all(end for _, end, _ in first.values())
    assert len({text for text, _, _ in first.values()}) == 1


@pytest.mark.parametrize("name", images.IMAGES)
def test_nothing_is_installed_without_its_hash(name: str) -> None:
    commands = re.sub(r"\\\n\s*", "", dockerfile(name))
    for command in re.findall(r"pip (?:--python \S+ )?(?:install|wheel)\b[^&\n]*", commands):
        assert "--no-deps" in command
        assert ("--require-hashes" in command) != ("--no-index" in command), command


@pytest.mark.parametrize("name", images.IMAGES)
def test_an_image_runs_as_a_number_and_asks_no_registry_for_a_frontend(name: str) -> None:
    text = dockerfile(name)
    assert "# syntax" not in text
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE) == ["10001:10001"]
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) <= {"${PYTHON}", "builder", "shared", "scratch"}
    assert f"ARG PYTHON={engine.BASE_IMAGE}\n" in text


def test_the_components_name_the_images_that_are_built() -> None:
    assert (images.tag("worker"), images.tag("trainer")) == (WORKER_IMAGE, TRAINER_IMAGE)
    assert (images.tag("worker", "cuda"), images.tag("trainer", "cuda")) == (WORKER_CUDA_IMAGE, TRAINER_CUDA_IMAGE)
    assert images.tag("trainer-tpu", "cuda") == images.tag("trainer-tpu") == TRAINER_TPU_IMAGE


def test_an_engine_that_cannot_be_started_is_a_line_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "is_running", lambda _: False)
    monkeypatch.setattr(engine, "find_docker", lambda: "docker")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = "apt-get install debootstrap docker.io iproute2 iptables"
    with raises_naming(engine.EngineError, missing), engine.engine(tmp_path):
        pytest.fail("there is none")
    monkeypatch.setattr(engine.os, "geteuid", lambda: 1000)
    with raises_naming(engine.EngineError, "root", "start Docker"), engine.engine(tmp_path):
        pytest.fail("there is none")


def test_a_disk_that_is_nearly_full_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "is_running", lambda _: False)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda program, **_: program)
    monkeypatch.setattr(engine, "MIN_FREE_BYTES", 10**18)
    with raises_naming(engine.EngineError, f"{10**9} "), engine.engine(tmp_path):
        pytest.fail("there is no room")


def test_the_commit_and_the_source_are_reported_or_unknown() -> None:
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", images.commit())
    assert re.match("https://|git@|unknown$", images.source())
