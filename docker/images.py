"""Builds the images with the running Docker engine: python docker/images.py [NAME...] (make images)."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import engine

import cappy

ROOT = Path(__file__).parents[1]
WHEELS = ROOT / "docker" / "wheels"
IMAGES = {
    "serving": "cappy-serving",
    "worker": "cappy-python-worker",
    "trainer": "cappy-python-trainer",
    "trainer-tpu": "cappy-python-trainer-tpu",
}
"""Dockerfile -> image; the components use all but serving."""
ARGUMENTS = ("PYTHON", "TORCH", "JAX")
"""Build arguments that are read from the environment."""


def tag(name: str, torch: str = "cpu") -> str:
    """The image name of a Dockerfile and a build of torch, with the version of this source tree as tag."""
    suffix = "" if torch == "cpu" or name == "trainer-tpu" else f"-{torch}"
    return f"{IMAGES[name]}{suffix}:{cappy.__version__}"


def commit() -> str:
    """The commit of the source tree, with -dirty if files differ from it."""
    result = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or "unknown"


def source() -> str:
    """`SOURCE`, else the git remote, if it is an https:// or git@ address without a password; else "unknown"."""
    result = subprocess.run(
        ["git", "-C", str(ROOT), "config", "--get", "remote.origin.url"], capture_output=True, text=True, check=False
    )
    address = os.environ.get("SOURCE", result.stdout.strip())
    return address if address.startswith(("https://", "git@")) and "@" not in address.partition("//")[2] else "unknown"


def download_torch(kind: str) -> None:
    """Downloads torch's CPU build into docker/wheels with this machine's pip settings; the package index lacks it."""
    lock = (ROOT / "docker/requirements/torch-cpu.lock").read_text()
    version = lock.partition("torch==")[2].split()[0]
    if kind != "cpu" or next(WHEELS.glob(f"torch-{version}-*.whl"), None):
        return
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(WHEELS),
        f"torch=={version}",
    ]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        raise engine.EngineError(
            f"docker/wheels: torch {version} is not on the package index; download its wheel for CPython 3.11 from "
            "PyTorch's index of CPU builds into docker/wheels, or build with TORCH=cuda"
        )


def build(names: Sequence[str], environment: dict[str, str]) -> dict[str, float]:
    """Builds these images; returns seconds by image. CalledProcessError if a build fails, after its output."""
    torch = environment.get("TORCH") or "cpu"
    download_torch(torch)
    source_arguments = {"VERSION": cappy.__version__, "COMMIT": commit(), "SOURCE": source()}
    build_arguments = {name: environment[name] for name in ARGUMENTS if environment.get(name)}
    options = [
        word
        for name, value in {**build_arguments, **source_arguments}.items()
        for word in ("--build-arg", f"{name}={value}")
    ]
    seconds = {}
    for name in names:
        started = time.monotonic()
        image = tag(name, torch)
        print(f"==> {image}", file=sys.stderr, flush=True)
        file = ["--file", str(ROOT / "docker" / f"{name}.Dockerfile")]
        command = [engine.find_docker(), "build", "--quiet", *file, "--tag", image, *options, str(ROOT)]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        seconds[image] = time.monotonic() - started
    return seconds


def main() -> int:
    """Builds the images given as arguments, or all."""
    names = sys.argv[1:] or list(IMAGES)
    if unknown := sorted(set(names) - set(IMAGES)):
        print(f"docker: unknown image {', '.join(unknown)}; choose from {', '.join(IMAGES)}", file=sys.stderr)
        return 2
    try:
        seconds = build(names, {**os.environ, "DOCKER_BUILDKIT": "1"})
    except engine.EngineError as error:
        print(error, file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        return error.returncode
    for image, duration in seconds.items():
        print(f"{image}: built in {duration:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
