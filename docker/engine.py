"""Runs a command with a Docker engine: python docker/engine.py COMMAND...

A running engine is used. Otherwise one is started for as long as the command runs, and the base image of the
Dockerfiles is built from Debian's packages under its own name, so that no image registry is needed.
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
"""Data folder of an engine that is started here; it keeps its images between starts."""
BASE_IMAGE = "python:3.11-slim-bookworm"
DEBIAN_SUITE = "bookworm"
PACKAGES = ("ca-certificates", "python3", "python3-venv")
PROGRAMS = {"dockerd": "docker.io", "iptables": "iptables", "debootstrap": "debootstrap", "ip": "iproute2"}
"""Program -> its Debian package."""
START_SECONDS, STOP_SECONDS, BASE_IMAGE_SECONDS = 60.0, 40.0, 600.0
MIN_FREE_BYTES = 20 * 10**9
"""Space for four images, their layers and downloads."""
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
BRIDGE = "docker0"
PR_SET_PDEATHSIG = 1  # prctl(2)


class EngineError(Exception):
    """No engine is available; the message is one line with the remedy."""


def find_docker() -> str:
    """The path of the Docker client, preferably Debian's, which needs no plugin for BuildKit."""
    path = shutil.which("docker", path=f"/usr/bin:{os.environ.get('PATH', '')}")
    if path is None:
        raise EngineError("docker: is not installed; run apt-get install docker.io")
    return path


def is_running(environment: Mapping[str, str]) -> bool:
    """Whether an engine answers in this environment."""
    command = [find_docker(), "version", "--format", "{{.Server.Version}}"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        return subprocess.run(command, env=environment, capture_output=True, timeout=20, check=False).returncode == 0
    return False


@contextlib.contextmanager
def engine(data: Path = DATA) -> Iterator[dict[str, str]]:
    """The environment in which `docker` reaches an engine; EngineError if none can be started."""
    environment = {**os.environ, "DOCKER_BUILDKIT": "1"}
    if is_running(environment):
        yield environment
        return
    check_requirements()
    try:
        with start_engine(data) as address:
            environment["DOCKER_HOST"] = address
            make_base_image(environment)
            yield environment
    finally:
        if os.environ.get("CI"):
            shutil.rmtree(data, ignore_errors=True)  # Gigabytes, and a CI checkout is used once.


def check_requirements() -> None:
    """Raises EngineError if an engine cannot be started here."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise EngineError("docker: no engine answers, and only root on Linux can start one; start Docker")
    if missing := sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None}):
        raise EngineError(f"docker: no engine answers; to start one here, run apt-get install {' '.join(missing)}")
    DATA.parent.mkdir(exist_ok=True)
    if (free := shutil.disk_usage(DATA.parent).free) < MIN_FREE_BYTES:
        raise EngineError(
            f"docker: {free / 1e9:.0f} GB of disk are free, {MIN_FREE_BYTES / 1e9:.0f} GB are needed; free some space"
        )


@contextlib.contextmanager
def start_engine(data: Path) -> Iterator[str]:
    """Starts an engine and yields its address; it is stopped after the block, or when this process dies."""
    data.mkdir(parents=True, exist_ok=True)
    # Not under `data`: the path of a socket may have at most 108 characters.
    run = Path(tempfile.mkdtemp(prefix="cappy-engine-"))
    address, log = f"unix://{run}/socket", run / "log"
    had_bridge = Path("/sys/class/net", BRIDGE).exists()
    command = ["dockerd", "--data-root", str(data), "--exec-root", str(run / "exec"), "--pidfile", str(run / "pid")]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--host", address], stdout=file, stderr=file, start_new_session=True, preexec_fn=die_with_parent
        )
    try:
        wait_until_ready(process, {**os.environ, "DOCKER_HOST": address}, log)
        yield address
    finally:
        stop_engine(process)
        unmount(data, run)
        shutil.rmtree(run, ignore_errors=True)
        if not had_bridge:
            subprocess.run(["ip", "link", "delete", BRIDGE], capture_output=True, timeout=10, check=False)


def die_with_parent() -> None:
    """Called in the child: sends it SIGTERM when the parent dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def wait_until_ready(process: "subprocess.Popen[bytes]", environment: Mapping[str, str], log: Path) -> None:
    """Waits until the engine answers; EngineError with the last line of its log if it does not."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if is_running(environment):
            return
        time.sleep(0.3)
    lines = log.read_text(errors="replace").strip().splitlines() or ["its log is empty"]
    raise EngineError(f"docker: the engine did not start: {lines[-1][:300]}")


def stop_engine(process: "subprocess.Popen[bytes]") -> None:
    """Stops the engine with its containers, and kills what is left of its process group."""
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(STOP_SECONDS)


def unmount(*folders: Path) -> None:
    """Unmounts what the engine left mounted in these folders, innermost first."""
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for mount in reversed(mounts):
        if any(Path(mount).is_relative_to(folder) for folder in folders):
            subprocess.run(["umount", "--lazy", mount], capture_output=True, timeout=20, check=False)


def make_base_image(environment: Mapping[str, str]) -> None:
    """Builds the base image of the Dockerfiles, once, from Debian's packages and this machine's certificates.

    It is not a copy of the official image: its Python 3.11 is Debian's, not built from source.
    """
    result = subprocess.run(
        [find_docker(), "image", "inspect", BASE_IMAGE], env=environment, capture_output=True, check=False
    )
    if result.returncode == 0:
        return
    with tempfile.TemporaryDirectory(prefix="cappy-base-") as folder:
        root = Path(folder)
        run_debootstrap(folder)
        shutil.copy(CERTIFICATES, root / CERTIFICATES.relative_to("/"))
        (root / "usr/bin/python").symlink_to("python3")
        for path in (root / "var/cache/apt/archives").glob("*.deb"):
            path.unlink()
        command = [
            find_docker(),
            "import",
            "--change",
            "ENV PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "-",
            BASE_IMAGE,
        ]
        with subprocess.Popen(["tar", "-C", folder, "-c", "."], stdout=subprocess.PIPE) as archive:
            subprocess.run(command, env=environment, stdin=archive.stdout, capture_output=True, timeout=300, check=True)


def run_debootstrap(folder: str) -> None:
    """Unpacks Debian with Python into a folder; EngineError if that fails or takes too long."""
    command = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", DEBIAN_SUITE, folder]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=BASE_IMAGE_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        remedy = "check that Debian's mirror is reachable"
        raise EngineError(f"docker: debootstrap did not finish in {BASE_IMAGE_SECONDS:.0f} s; {remedy}") from error
    if result.returncode:
        lines = (result.stdout + result.stderr).strip().splitlines()[-1:]
        raise EngineError(f"docker: debootstrap failed: {' '.join(lines)[:300]}")


def main() -> int:
    """Runs the command; returns its exit status, or 1 without an engine."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with engine() as environment:
            return subprocess.run(sys.argv[1:], env=environment, check=False).returncode
    except EngineError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
