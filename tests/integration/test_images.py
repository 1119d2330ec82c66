"""The images, built and run by a real engine: started for these tests where none answers (docker/engine.py)."""

import contextlib
import json
import re
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import engine
import images
import locks
import pytest
from processes import free_port
from waiting import wait_until

import cappy
from cappy.annotation.step import AnnotationConfig
from cappy.annotation.step import run as annotation
from cappy.builtin import TINY_SCORER_FOLDER
from cappy.preparation.step import PreparationConfig
from cappy.preparation.step import run as preparation
from cappy.records import read
from cappy.scoring import Scorer
from pipelines.definitions import PIPELINES

BUILD_SECONDS, RUN_SECONDS = 1800, 300
pytestmark = [pytest.mark.docker, pytest.mark.timeout(BUILD_SECONDS + RUN_SECONDS)]

ROOT = Path(__file__).parents[2]
NAMES = tuple(images.IMAGES)
USER = 10001
BILL = "usr/share/sbom/cappy.cdx.json"
LOCKED_DOWN = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
PAIRS = [["Sort: pear fig", "fig pear"], ["Sort: pear fig", "pear fig"], ["Add: 2 and 3", "5"]]
SMALL = {
    "preparation": {"num_per_family": 4},
    "finetuning": {"epochs": 1, "batch_instances": 2},
}
ADAPT = """
import json, os, sys
from kfp import local
from pipelines.builder import build
from pipelines.definitions import PIPELINES
from pipelines.recipe import check_recipe
from pipelines.submission import prepare
from pathlib import Path

os.umask(0)
folder, settings = sys.argv[1], json.loads(sys.argv[2])
os.mkdir(f"{folder}/pipeline")  # else the engine makes it, as root
tracking = f"sqlite:///{folder}/mlflow.db"
steps = PIPELINES["adapt"].settings({"strategy": "sampling8"}, settings, tracking)
submission = prepare("adapt", steps, work=Path(folder, "work"))
mounts = {"mounts": [{"Type": "bind", "Source": folder, "Target": folder}], "tmpfs": {"/tmp": ""}}
local.init(
    local.DockerRunner(read_only=True, network_mode="none", working_dir=folder, **mounts),
    pipeline_root=f"{folder}/pipeline",
    enable_caching=False,
)
pipeline = build(check_recipe({"pipeline": "adapt"}))
pipeline(**submission.arguments)
"""


class Containers:
    """The images, and what runs of them."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment

    def docker(self, *words: str, check: bool = True, seconds: float = RUN_SECONDS) -> subprocess.CompletedProcess[str]:
        """The client's outcome; what it said, where it failed."""
        command = [engine.find_docker(), *words]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=seconds, check=False
        )
        assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
        return done

    def run(self, name: str, *command: str, options: tuple[str, ...] = (), check: bool = True) -> str:
        """What a command prints in a container that may do nothing and reach nobody."""
        words = ("run", "--rm", "--network", "none", *LOCKED_DOWN, *options, images.tag(name), *command)
        done = self.docker(*words, check=check)
        return done.stdout + done.stderr

    def python(self, name: str, program: str) -> str:
        """What a program of Python prints."""
        return self.run(name, "-c", program, options=("--entrypoint", "python"))

    def inspect(self, name: str) -> dict[str, Any]:
        """The configuration of an image."""
        result: dict[str, Any] = json.loads(self.docker("image", "inspect", images.tag(name)).stdout)[0]["Config"]
        return result

    @contextlib.contextmanager
    def running(self, *words: str) -> Iterator[str]:
        """The id of a container in the background, removed with the block."""
        result = self.docker("run", "--detach", *LOCKED_DOWN, *words).stdout.strip()
        try:
            yield result
        finally:
            self.docker("rm", "--force", "--volumes", result, check=False)

    @contextlib.contextmanager
    def files(self, name: str) -> Iterator[tarfile.TarFile]:
        """The file system of an image, member by member, without starting it."""
        made = self.docker("create", images.tag(name)).stdout.strip()
        command = [engine.find_docker(), "export", made]
        with subprocess.Popen(command, env=self.environment, stdout=subprocess.PIPE) as process:
            try:
                with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                    yield archive
            finally:
                process.kill()
                self.docker("rm", "--force", made)


@pytest.fixture(scope="module")
def containers() -> Iterator[Containers]:
    """An engine that has all images, built of this source tree."""
    try:
        with engine.engine() as environment:
            command = [sys.executable, str(ROOT / "docker/images.py")]
            subprocess.run(command, env={**environment, "PYTHONPATH": str(ROOT)}, timeout=BUILD_SECONDS, check=True)
            yield Containers(environment)
    except engine.EngineError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that a container's user may write to; its parents are pytest's, so that others may not pass by name."""
    made = tmp_path_factory.mktemp("work")
    made.chmod(0o777)
    return made


@pytest.fixture(scope="module")
def annotated(folder: Path) -> Path:
    """A few annotated instances of the built-in tasks."""
    work = folder / "steps"
    source = PreparationConfig(source="builtin", target=folder / "prepared", num_per_family=4, work=work)
    preparation(source)
    annotation(AnnotationConfig(source=folder / "prepared", target=folder / "annotated", work=work))
    return folder / "annotated"


def mounted(folder: Path) -> tuple[str, ...]:
    return ("--mount", f"type=bind,source={folder},target={folder}", "--workdir", str(folder))


def answer(url: str, body: object = None) -> tuple[int, Any]:
    """Status and JSON of an answer; 0 where nobody listens."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
    except OSError:
        return 0, None


def wait_for(condition: Callable[[], bool], what: str, details: Callable[[], str]) -> None:
    wait_until(condition, what, seconds=120, pause=0.5, details=details)


@pytest.mark.parametrize("name", NAMES)
def test_the_command_runs_with_nothing_to_write_to_but_tmp(containers: Containers, name: str) -> None:
    command = ("--version",) if name == "serving" else ("cappy", "--version")
    assert containers.run(name, *command) == f"cappy {cappy.__version__}\n"


@pytest.mark.parametrize("name", NAMES)
def test_the_user_is_a_fixed_one_that_owns_nothing(containers: Containers, name: str) -> None:
    assert containers.inspect(name)["User"] == f"{USER}:{USER}"
    program = "import os, pwd; print(os.getuid(), os.getgid(), pwd.getpwuid(os.getuid()).pw_name)"
    assert containers.python(name, program) == f"{USER} {USER} cappy\n"
    with containers.files(name) as archive:
        assert [member.name for member in archive if member.uid == USER] == ["data"]


@pytest.mark.parametrize("name", NAMES)
def test_labels_name_version_commit_and_source(containers: Containers, name: str) -> None:
    labels = containers.inspect(name)["Labels"]
    result = {key.rpartition(".")[2]: value for key, value in labels.items() if key.startswith("org.opencontainers")}
    assert result["title"] == images.IMAGES[name]
    assert result["version"] == cappy.__version__
    assert result["revision"] == images.commit()
    assert result["source"] == images.source()


@pytest.mark.parametrize("name", NAMES)
def test_the_bill_of_materials_lists_what_is_installed(containers: Containers, name: str) -> None:
    with containers.files(name) as archive:
        bill = next(json.load(archive.extractfile(member)) for member in archive if member.name == BILL)  # type: ignore[arg-type]
    listed = {result["name"].lower(): result["version"] for result in bill["components"]}
    program = "import json, importlib.metadata as m; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    installed = json.loads(containers.python(name, program))
    assert {"torch", "transformers"} <= set(installed)
    assert {key: version for key, version in installed.items() if listed.get(key.lower()) != version} == {}
    assert {"cpython", "libc6"} <= set(listed)
    assert ("kfp" in installed) == (name != "serving")


def test_pinned_versions_are_those_of_the_lock(containers: Containers) -> None:
    result = [re.findall(r"^([\w.-]+)==([^\s;\\]+)", path.read_text(), re.MULTILINE) for path in locks.LOCKED]
    pins = {name.lower(): version for pairs in result for name, version in pairs}
    assert {"torch", "transformers", "numpy"} <= pins.keys()
    program = "import json, importlib.metadata as m; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    for name in NAMES:
        installed = json.loads(containers.python(name, program))
        actual = {key: version.partition("+")[0] for key, version in installed.items() if key.lower() in pins}
        assert actual == {key: pins[key.lower()] for key in actual}


def test_the_serving_image_has_no_shell_compiler_or_package_manager(containers: Containers) -> None:
    with containers.files("serving") as archive:
        members = {member.name: member for member in archive}
    programs = {name for name in members if name.rpartition("/")[0].endswith("bin") and not members[name].isdir()}
    system = {name for name in programs if "site-packages" not in name}
    assert {name.rpartition("/")[2] for name in system} == {"cappy", "python", "python3", "python3.11"}
    tools = "sh bash dash busybox gcc g++ cc ld as make apt apt-get dpkg pip pip3 uv perl curl wget".split()
    assert {name for name in members if name.rpartition("/")[2] in tools and members[name].isfile()} == set()
    packages = {name.split("site-packages/")[1].split("/")[0] for name in members if "site-packages/" in name}
    assert packages & {"kfp", "pip", "deepspeed", "kubernetes", "ensurepip"} == set()
    assert [name for name, member in members.items() if member.mode & 0o6000] == []
    assert containers.docker("run", "--rm", "--entrypoint", "sh", images.tag("serving"), check=False).returncode == 127


def test_the_command_of_our_kserve_manifest_is_in_the_serving_image(containers: Containers) -> None:
    help_text = containers.run("serving", "-m", "serving", "--help", options=("--entrypoint", "python"))
    assert "--scorer" in help_text


def test_the_serving_image_keeps_the_contract_of_vertex(containers: Containers, folder: Path) -> None:
    model, place, port = folder / "scorer", "/v1/endpoints/1/deployedModels/2", free_port()
    subprocess.run(["cp", "-r", str(TINY_SCORER_FOLDER), str(model)], check=True)
    variables = {
        "AIP_HTTP_PORT": "9000",
        "AIP_HEALTH_ROUTE": place,
        "AIP_PREDICT_ROUTE": f"{place}:predict",
        "AIP_STORAGE_URI": "/model",
    }
    actual = [word for name, value in variables.items() for word in ("--env", f"{name}={value}")]
    mount = ("--mount", f"type=bind,source={model},target=/model,readonly", "--publish", f"127.0.0.1:{port}:9000")
    address = f"http://127.0.0.1:{port}"
    with containers.running(*actual, *mount, images.tag("serving")) as container:

        def said() -> str:
            return containers.docker("logs", container).stderr

        wait_for(lambda: answer(address + place)[0] == 200, f"an answer of {address}{place}", said)
        status, service_scores = answer(f"{address}{place}:predict", {"instances": PAIRS})
        here = Scorer.load(str(model)).score([(one, two) for one, two in PAIRS])
        assert status == 200
        assert [result["score"] for result in service_scores["predictions"]] == pytest.approx(here, abs=1e-4)

        def state(part: str) -> str:
            return containers.docker("inspect", "--format", f"{{{{.State.{part}}}}}", container).stdout.strip()

        wait_for(lambda: state("Health.Status") == "healthy", "a healthy container", said)
        # What was accepted is answered and the door closed; the client's own patience is ten seconds otherwise.
        containers.docker("stop", "--time", "60", container)
        assert state("ExitCode") == "0", said()


@pytest.mark.parametrize(
    ("name", "flags", "options"),
    [
        ("trainer", (), ()),
        ("trainer", ("--parallelism", "deepspeed", "--devices", "2"), ("--shm-size", "1g")),
        ("trainer-tpu", ("--parallelism", "jax", "--devices", "2"), ()),
    ],
    ids=["trainer", "trainer by DeepSpeed on two ranks", "trainer-tpu by JAX on two devices"],
)
def test_a_trainer_trains_the_builtin_scorer(
    containers: Containers, folder: Path, annotated: Path, name: str, flags: tuple[str, ...], options: tuple[str, ...]
) -> None:
    work = folder / f"work-{name}-{len(flags)}"
    work.mkdir(mode=0o777)
    work.chmod(0o777)
    jax = ("--env", "JAX_PLATFORMS=cpu", "--env", "XLA_FLAGS=--xla_force_host_platform_device_count=2")
    places = ("--source", str(annotated), "--target", str(work / "scorer"), "--work", str(work))
    plan = ("--scorer", "builtin:tiny", "--batch-instances", "2", "--dry-run")
    options = (*mounted(folder), *options, *(jax if "jax" in flags else ()), "--env", "OMP_NUM_THREADS=1")
    printed = containers.run(name, "cappy", "finetuning", *places, *plan, *flags, options=options)
    assert "pairs" in printed


def test_the_pipeline_adapt_runs_in_the_images(containers: Containers, folder: Path) -> None:
    log = folder / "adapt.log"
    place = folder / "adapt"
    place.mkdir(mode=0o777)
    place.chmod(0o777)
    command = [sys.executable, "-c", ADAPT, str(place), json.dumps(SMALL)]
    environment = {**containers.environment, "PYTHONPATH": str(ROOT)}
    with log.open("wb") as file:
        done = subprocess.run(
            command, env=environment, stdout=file, stderr=file, cwd=place, timeout=900, check=False
        ).returncode
    assert done == 0, log.read_text(errors="replace")[-6000:]
    records = [json.loads(path.read_text()) for path in (place / "work/records").glob("*.json")]
    steps = {result["step"]: result["status"] for result in records}
    # So few instances show too little for the gate to promote; where it does, deployment runs as well.
    assert steps.pop("deployment", "done") == "done"
    assert steps == dict.fromkeys(set(PIPELINES["adapt"].steps) - {"deployment"}, "done")
    assert {path.stat().st_uid for path in (place / "work/records").glob("*.json")} == {USER}
    sampled = next(result["target"] for result in records if result["step"] == "sampling")
    assert any(instance.candidates for instance in read(Path(sampled)))
    assert (place / "mlflow.db").exists()


CAPPY = str(Path(sys.executable).with_name("cappy"))


def test_the_verb_runs_a_pipeline_in_the_images(containers: Containers, folder: Path) -> None:
    place = folder / "verb"
    place.mkdir()
    (place / "asked.jsonl").write_text(json.dumps({"instruction": "Add 1 and 1.", "responses": ["2", "fish"]}) + "\n")
    words = ("pipeline", "run", "batch_score", "--on", "docker", "--json", "--set", "preparation.source=asked.jsonl")
    environment = {**containers.environment, "PYTHONPATH": str(ROOT)}
    command = [CAPPY, *words, "--set", "scoring.scorer=builtin:tiny"]
    done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr + "".join(path.read_text() for path in place.glob(".cappy/runs/*/run.log"))
    actual = json.loads(done.stdout)
    (instance,) = read(Path(actual["scored"]))
    assert [candidate.response for candidate in instance.candidates] == ["2", "fish"]
    assert all(actual["version"] in candidate.scores for candidate in instance.candidates)


def test_a_run_in_the_images_that_is_asked_to_end_leaves_no_container(containers: Containers, folder: Path) -> None:
    place = folder / "ended"
    place.mkdir()
    environment = {**containers.environment, "PYTHONPATH": str(ROOT)}
    command = [CAPPY, "pipeline", "run", "adapt", "--on", "docker", "--set", "preparation.num_per_family=500"]

    def running() -> str:
        result = place.glob(".cappy/runs/*")
        return "".join(
            containers.docker("ps", "--quiet", "--filter", f"label=cappy.run={path.name}").stdout for path in result
        )

    with subprocess.Popen(command, env=environment, cwd=place, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: bool(running()), "a container", lambda: f"status {process.poll()}")
        process.terminate()
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 130, said
    assert running() == ""
