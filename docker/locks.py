"""Writes docker/requirements/*.lock, the lock files of the images, from requirements.lock: make image-locks.

Versions come from requirements.lock and hashes from the package index, for CPython 3.11 on Linux x86-64. Each file adds
packages to those of the layer below it. The CPU build of torch is hashed from docker/wheels.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
REQUIREMENTS = ROOT / "docker" / "requirements"
WHEELS = ROOT / "docker" / "wheels"
LOCKED = (ROOT / "requirements.lock", ROOT / "requirements" / "torch-default.lock")

SERVING = (
    *("torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "numpy", "scipy", "pyarrow", "regex"),
    *("fastapi", "uvicorn", "prometheus-client", "openai", "httpx2", "pydantic", "pyyaml", "typer", "rich"),
    # MLflow's client without its server, and the libraries that read a scorer from a bucket.
    *("mlflow-skinny", "fsspec", "google-cloud-storage", "boto3"),
)
"""Packages that `cappy serve` and `cappy gateway` need; a test starts both in the image."""
WORKER = ("pipelines", "gcp", "registry", "serve")
"""Extras of the worker, in addition to the project's dependencies."""
BUILD_TOOLS = {"pip": "26.3", "wheel": "0.48.0", "cyclonedx-bom": "7.5.0"}
"""Versions of the build tools that are not in requirements.lock."""

Pins = dict[str, tuple[str, str]]
"""Name, as in the package's metadata -> version, sha256 of the file that pip installs on this platform."""


def main() -> None:
    """Resolves each set of packages and writes its file."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    worker = [*project["dependencies"], *(line for extra in WORKER for line in extras[extra])]
    serving, torch = resolve(SERVING), resolve(["torch"])
    worker_pins = resolve(worker)
    # The CPU build of torch depends on none of these.
    cuda = {name: pin for name, pin in torch.items() if is_cuda_package(name)}
    shared = without(serving, cuda)
    write("torch-cuda", cuda, "torch and the CUDA libraries of its default build")
    write(
        "torch-cpu", {"torch": (cuda["torch"][0] + "+cpu", cpu_hash())}, "torch's CPU build, hashed from docker/wheels"
    )
    write("serving", shared, "packages of every image, without torch")
    worker_only = without(worker_pins, cuda, shared)
    write("worker", worker_only, "packages that worker, trainer and trainer-tpu add to serving")
    write(
        "trainer", without(resolve(extras["train"]), cuda, shared, worker_only), "packages that trainer adds to worker"
    )
    jax = without(resolve(extras["tpu"]), shared, worker_only)
    write("jax-cpu", jax, "packages that trainer-tpu adds to worker")
    write(
        "jax-tpu",
        without(resolve(["jax[tpu]", *extras["tpu"]]), shared, worker_only),
        "packages that trainer-tpu adds to worker, with the TPU library",
    )
    write(
        "builder",
        resolve([pinned_requirement("pip"), pinned_requirement("wheel"), "setuptools"]),
        "tools that build wheels; in no image",
    )
    write(
        "sbom",
        resolve([pinned_requirement("cyclonedx-bom")]),
        "the tool that writes the bill of materials; in no image",
    )


def is_cuda_package(name: str) -> bool:
    """Whether a package is torch or is installed only with its CUDA build."""
    return name in ("torch", "triton") or name.startswith(("nvidia-", "cuda-"))


def pinned_requirement(name: str) -> str:
    """A tool's requirement with its exact version."""
    return f"{name}=={BUILD_TOOLS[name]}"


def resolve(requirements: Iterable[str]) -> Pins:
    """The packages that pip would install from the index into an empty environment; nothing is installed."""
    with tempfile.TemporaryDirectory() as folder:
        constraints, report = Path(folder) / "constraints", Path(folder) / "report.json"
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in read_locks().items()))
        command = [sys.executable, "-m", "pip", "--isolated", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report), "--constraint", str(constraints), *sorted(set(requirements))]
        # Only from the index: other machines could not download files that are on this disk.
        subprocess.run(command, check=True, env={**pip_environment(os.environ), "PIP_CONFIG_FILE": os.devnull})
        return read_report(json.loads(report.read_text()))


def read_locks() -> dict[str, str]:
    """Name -> version of all packages in the lock files of the development environment, with the CUDA libraries."""
    lines = re.findall(r"^([\w.-]+)==([\w.+]+)", "\n".join(path.read_text() for path in LOCKED), re.MULTILINE)
    return dict(lines)


def pip_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without pip settings, such as other indexes; certificates are kept."""
    cleaned = {name: value for name, value in environment.items() if not name.startswith("PIP_")}
    return cleaned | {"PIP_CERT": environment["PIP_CERT"]} if "PIP_CERT" in environment else cleaned


def read_report(report: Mapping[str, Any]) -> Pins:
    """Names, versions and hashes in pip's installation report."""
    packages = ((item["metadata"], item["download_info"]["archive_info"]["hashes"]) for item in report["install"])
    return {metadata["name"]: (metadata["version"], hashes["sha256"]) for metadata, hashes in packages}


def without(packages: Pins, *others: Pins) -> Pins:
    """The packages that are in no other set."""
    known = {name for other in others for name in other}
    return {name: pin for name, pin in packages.items() if name not in known}


def cpu_hash() -> str:
    """The hash of torch's CPU build in docker/wheels, or the one in the lock if the wheel is missing."""
    wheel = next(WHEELS.glob("torch-*cpu*.whl"), None)
    if wheel is None:
        return (REQUIREMENTS / "torch-cpu.lock").read_text().rpartition("sha256:")[2].strip()
    with wheel.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def format_lock(pinned_packages: Pins, description: str) -> str:
    """The text of a requirements file with hashes."""
    lines: Sequence[str] = [
        f"{name}=={version} \\\n    --hash=sha256:{digest}\n"
        for name, (version, digest) in sorted(pinned_packages.items(), key=lambda item: item[0].lower())
    ]
    return f"# Made by make image-locks from requirements.lock: {description}.\n" + "".join(lines)


def write(name: str, pinned_packages: Pins, description: str) -> None:
    """Writes one lock file."""
    REQUIREMENTS.mkdir(exist_ok=True)
    (REQUIREMENTS / f"{name}.lock").write_text(format_lock(pinned_packages, description))
    print(f"{name}: {len(pinned_packages)} packages")


if __name__ == "__main__":
    main()
