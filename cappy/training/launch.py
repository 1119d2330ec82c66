"""Which of several machines this one is, and its ranks: children that report to us and end together."""

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TextIO, TypedDict

import torch

from cappy import errors
from cappy.config import encode, to_values
from cappy.errors import ConfigError, TrainingError, quote
from cappy.progress import Progress
from cappy.records import Manifest
from cappy.training.checkpoint import CONTINUE_REMEDY
from cappy.training.distributed import is_launched
from cappy.training.settings import TrainingSettings

TRAINING_POOLS = ("workerpool0", "workerpool1")
"""Vertex AI's pools that train: the first machine, and the others. Pools 2 and 3 are for other servers."""
REPORT_VARIABLE = "CAPPY_RANK_PIPES"
"""Environment of a rank that we started: descriptor to report to, and descriptor that ends with its parent."""
VERSION_VARIABLE = "CAPPY_STEP_VERSION"
"""Environment of a job: the version of the step that submitted it, which the job must have too."""
UNEXPECTED_ERROR = "a rank failed with a defect, see above"
NO_REPORT = "the ranks ended without a report"
GRACE_SECONDS = 10.0
"""How long the other ranks may go on when one has ended badly: time to end by themselves, not to hang."""


class Report(TypedDict, total=False):
    """What a rank reports: how far it is, the manifest of what it wrote, a CappyError (kind, text), or a traceback."""

    progress: tuple[int, int | None, str, int, str]
    manifest: str
    error: tuple[str, str]
    defect: str


@dataclass(frozen=True, slots=True)
class Topology:
    """Machine `node` of `nodes`; all meet at `address` and `port` (0: any free one, where there is one machine)."""

    node: int = 0
    nodes: int = 1
    address: str = "127.0.0.1"
    port: int = 0


def topology(config: TrainingSettings, environment: Mapping[str, str] | None = None) -> Topology:
    """This machine's place: from Vertex AI's CLUSTER_SPEC, or from NODE_RANK with MASTER_ADDR and MASTER_PORT.

    ConfigError where more machines are asked for than the environment names.
    """
    variables = os.environ if environment is None else environment
    here = Topology()
    if spec := variables.get("CLUSTER_SPEC"):
        here = _parse_cluster_spec(spec)
    elif {"NODE_RANK", "MASTER_ADDR", "MASTER_PORT"} <= variables.keys() and config.nodes > 1:
        here = Topology(
            int(variables["NODE_RANK"]), config.nodes, variables["MASTER_ADDR"], int(variables["MASTER_PORT"])
        )
    if config.nodes not in (1, here.nodes):
        remedy = "start it with torchrun, a TrainJob or a CustomJob, or set NODE_RANK, MASTER_ADDR and MASTER_PORT"
        raise ConfigError(f"--nodes {config.nodes}: the environment tells of {here.nodes}; {remedy}")
    return here


def must_launch(config: TrainingSettings) -> bool:
    """Whether this process, being no rank itself, has to start some: several, or the one that DeepSpeed wants."""
    if config.parallelism == "jax":
        _refuse_several_processes(config)
        return False
    if is_launched():
        return False
    count = config.devices * topology(config).nodes
    if config.parallelism == "single" and count > 1:
        raise ConfigError(f"--parallelism single: is for one rank, and {count} were asked for; give ddp or deepspeed")
    return count > 1 or config.parallelism == "deepspeed"


def _refuse_several_processes(config: TrainingSettings) -> None:
    """ConfigError where several machines or processes are to train with JAX."""
    nodes = config.nodes if config.nodes > 1 else topology(config).nodes
    if nodes > 1:
        raise ConfigError(f"--parallelism jax: is for one machine, and {nodes} were asked for; give ddp or deepspeed")
    if is_launched() and int(os.environ["WORLD_SIZE"]) > 1:
        remedy = "start it without torchrun, or with one process"
        raise ConfigError(f"--parallelism jax: one process drives all devices, this is one of several; {remedy}")


def launch_ranks(step: str, config: TrainingSettings, progress: Progress) -> Manifest:
    """Runs the step in `config.devices` processes on this machine and returns the manifest that they agree on.

    The error of the rank that failed, or TrainingError. SIGTERM and Ctrl-C are passed on as SIGTERM, which makes the
    ranks write a checkpoint; if this process is killed the ranks are too.
    """
    if torch.cuda.is_available() and torch.cuda.device_count() < config.devices:
        raise ConfigError(f"--devices {config.devices}: this machine has {torch.cuda.device_count()} GPUs")
    reading, report = os.pipe()
    life, living = os.pipe()
    command = [sys.executable, "-m", "cappy.training", step, encode(to_values(config))]
    here = topology(config)
    here = replace(here, port=here.port or _free_port())
    ranks = [
        subprocess.Popen(  # noqa: S603 (our own interpreter and module)
            command,
            env=_rank_environment(here, config.devices, local, f"{report},{life}"),
            pass_fds=(report, life),
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else subprocess.DEVNULL,
        )
        for local in range(config.devices)
    ]
    os.close(report)
    os.close(life)
    try:
        with _forward_signals(ranks):
            return _follow(ranks, reading, progress)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        os.close(reading)
        os.close(living)


def _follow(ranks: Sequence["subprocess.Popen[bytes]"], reading: int, progress: Progress) -> Manifest:
    """Reads reports until all ranks have ended; the first that ends badly decides what is said."""
    reports = Report()
    deadline = float("inf")
    for message in _read_reports(reading, lambda: any(rank.poll() is None for rank in ranks)):
        if "progress" in message:
            done, total, unit, resumed, note = message["progress"]
            progress(done, total, unit=unit, resumed=resumed, note=note)
        reports = message | reports  # The first of each kind counts.
        if any(rank.poll() for rank in ranks):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > deadline:
            break
    failed = [(number, rank.poll()) for number, rank in enumerate(ranks) if rank.poll()]
    if not failed and "manifest" in reports:
        return Manifest.from_json(reports["manifest"])
    if "error" in reports:
        kind, text = reports["error"]
        raise getattr(errors, kind)(text)
    killed = [(number, status) for number, status in failed if status is not None and status < 0]
    if killed:
        number, status = killed[0]
        raise TrainingError(f"rank {number} was ended by signal {-status}; {CONTINUE_REMEDY} at the last checkpoint")
    sys.stderr.write(reports.get("defect", ""))
    raise TrainingError(UNEXPECTED_ERROR if "defect" in reports else NO_REPORT)


def _read_reports(reading: int, alive: Callable[[], bool]) -> Iterator[Report]:
    """What the ranks report, and an empty message now and then, until they are gone."""
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(reading, selectors.EVENT_READ)
        while True:
            data = os.read(reading, 2**16) if selector.select(0.2) else None
            *lines, rest = (rest + (data or b"")).split(b"\n")
            yield from map(json.loads, lines)
            if data == b"" or (data is None and not alive()):
                return
            yield Report()


def _rank_environment(here: Topology, devices: int, local: int, pipes: str) -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    threads = max(1, (os.cpu_count() or 1) // devices)
    return {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", "")))),
        "RANK": str(here.node * devices + local),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(here.nodes * devices),
        "LOCAL_WORLD_SIZE": str(devices),
        "MASTER_ADDR": here.address,
        "MASTER_PORT": str(here.port),
        REPORT_VARIABLE: pipes,
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _has_descriptor(stream: TextIO) -> bool:
    """Whether a child can write to it; a test's or a notebook's stream may have none."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        return int(stream.fileno()) >= 0
    return False


@contextlib.contextmanager
def _forward_signals(ranks: Sequence["subprocess.Popen[bytes]"]) -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            rank.terminate()

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread: nobody can listen
        yield
        return
    try:
        yield
    except KeyboardInterrupt:
        end(signal.SIGINT, None)
        with contextlib.suppress(subprocess.TimeoutExpired):
            for rank in ranks:
                rank.wait(GRACE_SECONDS)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _parse_cluster_spec(spec: str) -> Topology:
    try:
        values = json.loads(spec)
        pools, task = values["cluster"], values["task"]
        machines = [(pool, index) for pool in TRAINING_POOLS for index in range(len(pools.get(pool, ())))]
        if len(machines) == 1:
            return Topology()
        address, _, port = pools[TRAINING_POOLS[0]][0].rpartition(":")
        return Topology(machines.index((task["type"], int(task["index"]))), len(machines), address, int(port))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(f"CLUSTER_SPEC: {quote(spec)} is not what Vertex AI writes; unset it or mend it") from error
