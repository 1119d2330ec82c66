"""Installs what the locks name, and this project, into an environment: make runs it.

Every file is checked by its hash, and nothing is installed that no lock names. Packages that come as source alone are
built with the tools of build.lock. torch's build is the one that pip finds on this machine: each has a lock of its own.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
DEFAULT = "default"
"""Stands in the name of a lock for torch as the package index has it: its version has no local part."""


def main(python: str) -> int:
    """Installs; an exit status, with a line where something is wrong that a person can mend."""
    install(python, FOLDER / "build.lock")
    problem = install_torch(python)
    if problem:
        print(f"make: {problem}", file=sys.stderr)
        return 1
    install(python, ROOT / "requirements.lock")
    pip(python, "install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    checked = subprocess.run([python, "-m", "pip", "check"], stdout=subprocess.PIPE, text=True, check=False)
    if checked.returncode:
        # A platform may need what the lock has not; it is named, and stops nobody.
        print(f"make: pip check says: {checked.stdout.strip()}", file=sys.stderr)
    return 0


def install(python: str, lock: Path) -> None:
    """Installs what a lock names, if its hashes are right; pip says what is wrong and CalledProcessError is raised."""
    pip(python, "install", "--no-deps", "--no-build-isolation", "--require-hashes", "--requirement", str(lock))


def install_torch(python: str) -> str:
    """Installs torch's build for this machine; what is wrong where its hash is not known, else nothing."""
    version = torch_version()
    there = installed_torch(python)
    kept = there.partition("+")[0] == version
    build = (there if kept else offered_torch(python, version)).partition("+")[2]
    lock = torch_lock(build)
    if lock.exists():
        install(python, lock)
    elif not kept:
        pin = f"torch=={version}+{build}"
        remedy = f"check that build and install it yourself, then make again: {python} -m pip install {pin}"
        return f"pip finds {pin} here, and {lock.relative_to(ROOT)} with its hash is missing; {remedy}"
    return ""


def torch_lock(build: str) -> Path:
    """The lock of a build: its local version, empty for the package index's."""
    return FOLDER / f"torch-{build or DEFAULT}.lock"


def torch_version() -> str:
    """The version that is locked, without a local part."""
    result = re.search(r"^torch==([\w.]+)", torch_lock("").read_text(), re.MULTILINE)
    return result[1] if result else ""


def installed_torch(python: str) -> str:
    """The version that the environment has; empty where it has none."""
    code = "import importlib.metadata as m; print(next((d.version for d in m.distributions(name='torch')), ''))"
    return subprocess.run([python, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def offered_torch(python: str, version: str) -> str:
    """The version, with its local part, that pip would take here; nothing is installed."""
    options = ("--dry-run", "--no-deps", "--ignore-installed", "--report", "-")
    report = json.loads(pip(python, "install", *options, f"torch=={version}"))
    return str(report["install"][0]["metadata"]["version"])


def pip(python: str, command: str, *options: str) -> str:
    """Runs pip and returns what it prints."""
    full = [python, "-m", "pip", command, "--quiet", "--disable-pip-version-check", *options]
    return subprocess.run(full, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1]))
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
