"""What is installed: every file by its hash, torch's build apart."""

import hashlib
import importlib.util
import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
from wording import assert_names

ROOT = Path(__file__).parents[1]
LOCKS = [ROOT / "requirements.lock", *sorted((ROOT / "requirements").glob("*.lock"))]
LINE = re.compile(r"([\w.-]+)==([\w.+]+)(?: ; [^\\\n]+)?((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n")


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"requirements_{name}", ROOT / "requirements" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


install, lock = module("install"), module("lock")


def pins(path: Path) -> Mapping[str, str]:
    return {name: version for name, version, _ in LINE.findall(path.read_text())}


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_every_line_of_a_lock_is_a_version_with_its_hashes(path: Path) -> None:
    comment, _, rest = path.read_text().partition("\n")
    assert comment.startswith("# ")
    assert "make lock" in comment
    assert LINE.sub("", rest) == ""
    result = LINE.findall(rest)
    names = [name for name, _, _ in result]
    assert names == sorted(set(names))
    for name, _, hashes in result:
        digests = re.findall("[0-9a-f]{64}", hashes)
        assert len(set(digests)) == len(digests) > 0, name


def test_torch_and_what_only_its_cuda_build_needs_are_apart_and_each_build_is_of_one_version() -> None:
    everyone = pins(ROOT / "requirements.lock")
    builds = {path.stem: pins(path) for path in (ROOT / "requirements").glob("torch-*.lock")}
    assert {"torch-default", "torch-cpu"} <= builds.keys()
    assert len({build["torch"].partition("+")[0] for build in builds.values()}) == 1
    for build in builds.values():
        assert not build.keys() & everyone.keys()
    cuda = builds["torch-default"].keys() - {"torch"}
    assert all(name == "triton" or name.startswith(("nvidia-", "cuda-")) for name in cuda)
    assert not any(name.startswith(("nvidia-", "cuda-", "torch", "triton")) for name in everyone)
    # On a Mac there is no CUDA, and nothing of it is asked for.
    text = (ROOT / "requirements" / "torch-default.lock").read_text()
    entries = re.findall(r"^([\w.-]+)==\S+(.*)\\$", text, re.MULTILINE)
    assert [name for name, marker in entries if "sys_platform == 'linux'" not in marker] == ["torch"]


def test_the_images_have_the_builds_of_torch_that_the_locks_have() -> None:
    for name, own in (("torch-cpu", "torch-cpu"), ("torch-cuda", "torch-default")):
        image = (ROOT / "docker" / "requirements" / f"{name}.lock").read_text()
        mine = (ROOT / "requirements" / f"{own}.lock").read_text()
        versions = dict(re.findall(r"^([\w.-]+)==([\w.+]+)", image, re.MULTILINE))
        assert versions == pins(ROOT / "requirements" / f"{own}.lock")
        assert set(re.findall("sha256:[0-9a-f]{64}", image)) <= set(re.findall("sha256:[0-9a-f]{64}", mine))


def test_what_builds_sources_is_the_lock_s_own() -> None:
    everyone, build = pins(ROOT / "requirements.lock"), pins(ROOT / "requirements" / "build.lock")
    assert set(build) == set(lock.BUILD)
    assert build.items() <= everyone.items()


def wheel(folder: Path, name: str, version: str) -> Path:
    """The smallest package."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    about = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": "",
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
        archive.writestr(f"{about}/RECORD", "".join(f"{file},,\n" for file in [*files, f"{about}/RECORD"]))
    return path


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with packages, the only place that pip looks at; it installs into `installed` there."""
    for name in ("PIP_CONFIG_FILE", "PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_TARGET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "installed"))
    return tmp_path


def lock_of(folder: Path, *paths: Path, stem: str = "some") -> Path:
    """A lock of these packages."""
    made = folder / f"{stem}.lock"
    lines = ["# Made by make lock: a test.\n"]
    for path in paths:
        name, version, *_ = path.name.split("-")
        lines.append(f"{name}=={version} \\\n    --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n")
    made.write_text("".join(lines))
    return made


def test_what_has_its_hash_is_installed_and_what_has_another_is_not(alone: Path) -> None:
    made = lock_of(alone, wheel(alone, "tiny", "1.0"))
    install.install(sys.executable, made)
    assert (alone / "installed" / "tiny.py").is_file()
    (alone / "installed" / "tiny.py").unlink()
    digest = re.findall("[0-9a-f]{64}", made.read_text())[0]
    made.write_text(made.read_text().replace(digest, f"{int(digest[0], 16) ^ 1:x}{digest[1:]}"))
    with pytest.raises(subprocess.CalledProcessError):
        install.install(sys.executable, made)
    assert not (alone / "installed" / "tiny.py").exists()


def test_a_package_without_a_hash_is_not_installed(alone: Path) -> None:
    wheel(alone, "tiny", "1.0")
    (alone / "some.lock").write_text("tiny==1.0\n")
    with pytest.raises(subprocess.CalledProcessError):
        install.install(sys.executable, alone / "some.lock")
    assert not (alone / "installed" / "tiny.py").exists()


@pytest.fixture
def machine(alone: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without torch, on which pip finds the builds that a test puts there."""
    monkeypatch.setattr(install, "FOLDER", alone)
    monkeypatch.setattr(install, "ROOT", alone)
    monkeypatch.setattr(install, "installed_torch", lambda _: "")
    return alone


@pytest.mark.parametrize("version", ["1.0", "1.0+cpu"])
def test_torch_is_the_build_of_the_machine_and_is_checked(version: str, machine: Path) -> None:
    (machine / "torch-default.lock").write_text(f"torch==1.0 \\\n    --hash=sha256:{'0' * 64}\n")
    build = version.partition("+")[2] or "default"
    lock_of(machine, wheel(machine, "torch", version), stem=f"torch-{build}")
    assert install.install_torch(sys.executable) == ""
    assert (machine / "installed" / f"torch-{version}.dist-info").is_dir()


def test_a_build_of_torch_whose_hash_is_not_known_is_a_line_with_the_remedy(machine: Path) -> None:
    (machine / "torch-default.lock").write_text(f"torch==1.0 \\\n    --hash=sha256:{'0' * 64}\n")
    wheel(machine, "torch", "1.0+rocm")
    problem = install.install_torch(sys.executable)
    assert_names(problem, "torch==1.0+rocm", "torch-rocm.lock")
    assert not (machine / "installed").exists()


def test_a_build_that_someone_installed_by_hand_is_left_alone(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "torch-default.lock").write_text(f"torch==1.0 \\\n    --hash=sha256:{'0' * 64}\n")
    monkeypatch.setattr(install, "installed_torch", lambda _: "1.0+rocm")
    assert install.install_torch(sys.executable) == ""


def test_make_installs_through_the_locks_alone() -> None:
    text = (ROOT / "Makefile").read_text()
    for line in text.splitlines():
        if "pip install" in line and "benchmarks/requirements.txt" not in line:
            assert "--require-hashes" in line, line
    assert "requirements/install.py" in text
