"""Gives a command a Docker engine to talk to: python docker/engine.py COMMAND...

An engine that answers already is used as it is. Else one is started for as long as the command runs, and the image that
the Dockerfiles begin with is made of Debian's packages under its name, so that no image registry is needed.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = ROOT / "build" / "engine"
"""Where an engine that is started here keeps its images from one start to the next."""
BASE = "python:3.11-slim-bookworm"
SUITE = "bookworm"
PACKAGES = ("ca-certificates", "python3", "python3-venv")
PROGRAMS = {"dockerd": "docker.io", "iptables": "iptables", "debootstrap": "debootstrap", "ip": "iproute2"}
"""Program -> Debian's package that has it."""
START_SECONDS, STOP_SECONDS, BASE_SECONDS = 60.0, 40.0, 600.0
LEAST_FREE_BYTES = 20 * 10**9
"""Four images, their layers, and what is downloaded for them."""
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
BRIDGE = "docker0"
PR_SET_PDEATHSIG = 1  # prctl(2)


class EngineError(Exception):
    """Why there is no engine, in one line with the remedy."""


def docker() -> str:
    """The client; Debian's own where it is there, since it builds by BuildKit without a plugin."""
    found = shutil.which("docker", path=f"/usr/bin:{os.environ.get('PATH', '')}")
    if found is None:
        raise EngineError("docker: is not installed; apt-get install docker.io")
    return found


def answers(environment: Mapping[str, str]) -> bool:
    """Whether an engine answers under this environment."""
    command = [docker(), "version", "--format", "{{.Server.Version}}"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        return subprocess.run(command, env=environment, capture_output=True, timeout=20, check=False).returncode == 0
    return False


@contextlib.contextmanager
def engine(data: Path = DATA) -> Iterator[dict[str, str]]:
    """The environment in which `docker` reaches an engine; EngineError where none can be had."""
    environment = {**os.environ, "DOCKER_BUILDKIT": "1"}
    if answers(environment):
        yield environment
        return
    check()
    try:
        with start_engine(data) as address:
            environment["DOCKER_HOST"] = address
            make_base(environment)
            yield environment
    finally:
        if os.environ.get("CI"):
            shutil.rmtree(data, ignore_errors=True)  # A checkout of CI is used once, and this is gigabytes.


def check() -> None:
    """Refuses what cannot work before anything is started."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise EngineError("docker: no engine answers, and only root on Linux can start one; start Docker")
    if missing := sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None}):
        raise EngineError(f"docker: no engine answers; to start one here: apt-get install {' '.join(missing)}")
    DATA.parent.mkdir(exist_ok=True)
    if (free := shutil.disk_usage(DATA.parent).free) < LEAST_FREE_BYTES:
        raise EngineError(f"docker: {free / 1e9:.0f} GB are free, {LEAST_FREE_BYTES / 1e9:.0f} are needed; free some")


@contextlib.contextmanager
def start_engine(data: Path) -> Iterator[str]:
    """The address of an engine of our own, which ends with the block, or with this process however that ends."""
    data.mkdir(parents=True, exist_ok=True)
    # Not below `data`: the path of a socket ends at 108 characters.
    run = Path(tempfile.mkdtemp(prefix="cappy-engine-"))
    address, log = f"unix://{run}/socket", run / "log"
    bridged = Path("/sys/class/net", BRIDGE).exists()
    command = ["dockerd", "--data-root", str(data), "--exec-root", str(run / "exec"), "--pidfile", str(run / "pid")]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--host", address], stdout=file, stderr=file, start_new_session=True, preexec_fn=die_with_parent
        )
    try:
        wait(process, {**os.environ, "DOCKER_HOST": address}, log)
        yield address
    finally:
        stop(process)
        unmount(data, run)
        shutil.rmtree(run, ignore_errors=True)
        if not bridged:
            subprocess.run(["ip", "link", "delete", BRIDGE], capture_output=True, timeout=10, check=False)


def die_with_parent() -> None:
    """In the child: SIGTERM when the parent is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def wait(process: "subprocess.Popen[bytes]", environment: Mapping[str, str], log: Path) -> None:
    """Until the engine answers; EngineError with its last words where it does not."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if answers(environment):
            return
        time.sleep(0.3)
    said = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
    raise EngineError(f"docker: an engine does not start here: {said[-1][:300]}")


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Ends the engine with its containers, and what is left of its group."""
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(STOP_SECONDS)


def unmount(*folders: Path) -> None:
    """Unmounts what an engine left mounted in these folders, innermost first."""
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for place in reversed(mounts):
        if any(Path(place).is_relative_to(folder) for folder in folders):
            subprocess.run(["umount", "--lazy", place], capture_output=True, timeout=20, check=False)


def make_base(environment: Mapping[str, str]) -> None:
    """Makes the image that the Dockerfiles begin with, once, of Debian's packages and this machine's certificates.

    It is not a copy of the official image: Debian's Python 3.11 stands in for one that was built from source.
    """
    there = subprocess.run([docker(), "image", "inspect", BASE], env=environment, capture_output=True, check=False)
    if there.returncode == 0:
        return
    with tempfile.TemporaryDirectory(prefix="cappy-base-") as folder:
        root = Path(folder)
        bootstrap(folder)
        shutil.copy(CERTIFICATES, root / CERTIFICATES.relative_to("/"))
        (root / "usr/bin/python").symlink_to("python3")
        for path in (root / "var/cache/apt/archives").glob("*.deb"):
            path.unlink()
        command = [docker(), "import", "--change", "ENV PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "-", BASE]
        with subprocess.Popen(["tar", "-C", folder, "-c", "."], stdout=subprocess.PIPE) as archive:
            subprocess.run(command, env=environment, stdin=archive.stdout, capture_output=True, timeout=300, check=True)


def bootstrap(folder: str) -> None:
    """Unpacks Debian with Python into a folder; EngineError where that fails or takes too long."""
    command = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, folder]
    try:
        made = subprocess.run(command, capture_output=True, text=True, timeout=BASE_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        remedy = "is Debian's mirror reached?"
        raise EngineError(f"docker: debootstrap made no base image in {BASE_SECONDS:.0f} s; {remedy}") from error
    if made.returncode:
        said = (made.stdout + made.stderr).strip().splitlines()[-1:]
        raise EngineError(f"docker: debootstrap made no base image: {' '.join(said)[:300]}")


def main() -> int:
    """Runs the command; its exit status, or 1 where there is no engine."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with engine() as environment:
            return subprocess.run(sys.argv[1:], env=environment, check=False).returncode
    except EngineError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
