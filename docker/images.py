"""Builds the images with the engine that answers: python docker/images.py [NAME...] (make images)."""

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
"""Dockerfile -> image; the components name the middle two."""
ARGUMENTS = ("PYTHON", "TORCH", "JAX")
"""Build arguments that the environment may give."""


def tag(name: str) -> str:
    """The image of a Dockerfile with the version of this source tree."""
    return f"{IMAGES[name]}:{cappy.__version__}"


def commit() -> str:
    """The commit of the source tree, marked where files differ from it."""
    told = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return told.stdout.strip() or "unknown"


def source() -> str:
    """Where the source is published, if git knows an address that others reach."""
    told = subprocess.run(
        ["git", "-C", str(ROOT), "config", "--get", "remote.origin.url"], capture_output=True, text=True, check=False
    )
    address = os.environ.get("SOURCE", told.stdout.strip())
    return address if address.startswith(("https://", "git@")) and "@" not in address.partition("//")[2] else "unknown"


def bring_torch(kind: str) -> None:
    """Puts torch's CPU build into docker/wheels from where pip finds it here; the package index has no such file."""
    lock = (ROOT / "docker/requirements/torch-cpu.lock").read_text()
    wanted = lock.partition("torch==")[2].split()[0]
    if kind != "cpu" or next(WHEELS.glob(f"torch-{wanted}-*.whl"), None):
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
        f"torch=={wanted}",
    ]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        raise engine.EngineError(
            f"docker/wheels: torch {wanted} is not on the package index; download its wheel for CPython 3.11 from "
            "PyTorch's index of CPU builds into docker/wheels, or build with TORCH=cuda"
        )


def build(names: Sequence[str], environment: dict[str, str]) -> dict[str, float]:
    """Builds these images; seconds by name. CalledProcessError, with the build's own output shown, if one fails."""
    bring_torch(environment.get("TORCH", "cpu"))
    known = {"VERSION": cappy.__version__, "COMMIT": commit(), "SOURCE": source()}
    given = {name: environment[name] for name in ARGUMENTS if environment.get(name)}
    words = [word for name, value in {**given, **known}.items() for word in ("--build-arg", f"{name}={value}")]
    seconds = {}
    for name in names:
        began = time.monotonic()
        print(f"==> {tag(name)}", file=sys.stderr, flush=True)
        file = ["--file", str(ROOT / "docker" / f"{name}.Dockerfile")]
        command = [engine.docker(), "build", "--quiet", *file, "--tag", tag(name), *words, str(ROOT)]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        seconds[name] = time.monotonic() - began
    return seconds


def main() -> int:
    """Builds what is named, or all."""
    names = sys.argv[1:] or list(IMAGES)
    if unknown := sorted(set(names) - set(IMAGES)):
        print(f"docker: no image {', '.join(unknown)}; there are {', '.join(IMAGES)}", file=sys.stderr)
        return 2
    try:
        seconds = build(names, {**os.environ, "DOCKER_BUILDKIT": "1"})
    except engine.EngineError as error:
        print(error, file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        return error.returncode
    for name, took in seconds.items():
        print(f"{tag(name)}: built in {took:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
