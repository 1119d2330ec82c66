"""Writes docker/requirements/*.lock, the hashed pins of the images, from requirements.lock: make image-locks.

Versions come from requirements.lock and hashes from the package index, for CPython 3.11 on Linux x86-64. Each file adds
to those before it, as the images' layers do. The CPU build of torch is hashed from docker/wheels.
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
    # MLflow's client without its server; what reads a scorer from a bucket.
    *("mlflow-skinny", "fsspec", "google-cloud-storage", "boto3"),
)
"""What `cappy serve` and `cappy gateway` need; a test starts both in the image."""
WORKER = ("pipelines", "gcp", "registry", "serve")
"""Extras of the worker, beside the project's own dependencies."""
OUTSIDE = {"pip": "26.3", "wheel": "0.48.0", "cyclonedx-bom": "7.5.0"}
"""Tools of the build that requirements.lock does not name."""

Pins = dict[str, tuple[str, str]]
"""Name, as metadata spells it -> version, sha256 of the file that pip takes on this platform."""


def main() -> None:
    """Resolves each set and writes its file."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    worker = [*project["dependencies"], *(line for extra in WORKER for line in extras[extra])]
    serving, torch = resolve(SERVING), resolve(["torch"])
    everything = resolve(worker)
    # What torch alone asks for, of which its CPU build has nothing, is what its own closure has beyond the CPU build's.
    cuda = {name: pin for name, pin in torch.items() if is_accelerated(name)}
    common = without(serving, cuda)
    write("torch-cuda", cuda, "torch and the CUDA libraries that its default build asks for")
    write(
        "torch-cpu", {"torch": (cuda["torch"][0] + "+cpu", cpu_hash())}, "torch's CPU build, hashed from docker/wheels"
    )
    write("serving", common, "what every image has beside torch")
    added = without(everything, cuda, common)
    write("worker", added, "what worker, trainer and trainer-tpu add to serving")
    write("trainer", without(resolve(extras["train"]), cuda, common, added), "what trainer adds to worker")
    jax = without(resolve(extras["tpu"]), common, added)
    write("jax-cpu", jax, "what trainer-tpu adds to worker")
    write("jax-tpu", without(resolve(["jax[tpu]", *extras["tpu"]]), common, added), "the same with the TPU's library")
    write(
        "builder",
        resolve([pinned_requirement("pip"), pinned_requirement("wheel"), "setuptools"]),
        "what builds wheels; in no image",
    )
    write("sbom", resolve([pinned_requirement("cyclonedx-bom")]), "what writes the bill of materials; in no image")


def is_accelerated(name: str) -> bool:
    """Whether a package comes with torch's CUDA build alone (or is torch)."""
    return name in ("torch", "triton") or name.startswith(("nvidia-", "cuda-"))


def pinned_requirement(name: str) -> str:
    """A tool's requirement with its exact version."""
    return f"{name}=={OUTSIDE[name]}"


def resolve(requirements: Iterable[str]) -> Pins:
    """What pip would install into an empty environment for these, by the index alone; nothing is installed."""
    with tempfile.TemporaryDirectory() as folder:
        constraints, report = Path(folder) / "constraints", Path(folder) / "report.json"
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in read_locks().items()))
        command = [sys.executable, "-m", "pip", "--isolated", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report), "--constraint", str(constraints), *sorted(set(requirements))]
        # Files on this machine's disk are not an index: whoever builds elsewhere could not fetch what they hash to.
        subprocess.run(command, check=True, env={**clean(os.environ), "PIP_CONFIG_FILE": os.devnull})
        return pins(json.loads(report.read_text()))


def read_locks() -> dict[str, str]:
    """Name -> version of all that the locks of .venv name, CUDA's libraries included."""
    lines = re.findall(r"^([\w.-]+)==([\w.+]+)", "\n".join(path.read_text() for path in LOCKED), re.MULTILINE)
    return dict(lines)


def clean(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what tells pip of other places to look at; certificates stay."""
    kept = {name: value for name, value in environment.items() if not name.startswith("PIP_")}
    return kept | {"PIP_CERT": environment["PIP_CERT"]} if "PIP_CERT" in environment else kept


def pins(report: Mapping[str, Any]) -> Pins:
    """Names, versions and hashes of an installation report."""
    found = ((item["metadata"], item["download_info"]["archive_info"]["hashes"]) for item in report["install"])
    return {metadata["name"]: (metadata["version"], hashes["sha256"]) for metadata, hashes in found}


def without(chosen: Pins, *others: Pins) -> Pins:
    """The pins that no other set has."""
    known = {name for other in others for name in other}
    return {name: pin for name, pin in chosen.items() if name not in known}


def cpu_hash() -> str:
    """The hash of torch's CPU build in docker/wheels, or the one that stands in the lock where it is not there."""
    wheel = next(WHEELS.glob("torch-*cpu*.whl"), None)
    if wheel is None:
        return (REQUIREMENTS / "torch-cpu.lock").read_text().rpartition("sha256:")[2].strip()
    with wheel.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text(chosen: Pins, told: str) -> str:
    """A requirements file in which every line has its hash."""
    lines: Sequence[str] = [
        f"{name}=={version} \\\n    --hash=sha256:{digest}\n"
        for name, (version, digest) in sorted(chosen.items(), key=lambda item: item[0].lower())
    ]
    return f"# Made by make image-locks from requirements.lock: {told}.\n" + "".join(lines)


def write(name: str, chosen: Pins, told: str) -> None:
    """Writes one lock file."""
    REQUIREMENTS.mkdir(exist_ok=True)
    (REQUIREMENTS / f"{name}.lock").write_text(text(chosen, told))
    print(f"{name}: {len(chosen)} packages")


if __name__ == "__main__":
    main()
