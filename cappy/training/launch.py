"""Launches the ranks of this machine as child processes, which report to this process and end together.

`topology` determines which of several machines this is.
"""

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
"""The worker pools of a CustomJob that train: the first machine, and the others. Pools 2 and 3 have other uses."""
REPORT_VARIABLE = "CAPPY_RANK_PIPES"
"""Environment variable of a launched rank: two pipe descriptors, to write reports and to notice the parent's exit."""
VERSION_VARIABLE = "CAPPY_STEP_VERSION"
"""Environment variable of a job: the version of the step that submitted it; the step in the job's image must match."""
UNEXPECTED_ERROR = "a rank failed with an unexpected error; its traceback is above"
NO_REPORT = "the ranks ended without a report"
GRACE_SECONDS = 10.0
"""How long the other ranks may run after one has failed, before they are killed."""


class RankReport(TypedDict, total=False):
    """A message from a rank: progress, the manifest of its output, a CappyError (class name, text) or a traceback."""

    progress: tuple[int, int | None, str, int, str]
    manifest: str
    error: tuple[str, str]
    traceback: str


@dataclass(frozen=True, slots=True)
class Topology:
    """Machine `node` of `nodes`; all ranks connect to `address` and `port` (0: any free port, for one machine only)."""

    node: int = 0
    nodes: int = 1
    address: str = "127.0.0.1"
    port: int = 0


def topology(config: TrainingSettings, environment: Mapping[str, str] | None = None) -> Topology:
    """The topology from Vertex AI's CLUSTER_SPEC, or from NODE_RANK with MASTER_ADDR and MASTER_PORT.

    Raises ConfigError if `config.nodes` is above 1 and differs from the number of machines in the environment.
    """
    variables = os.environ if environment is None else environment
    machine = Topology()
    if spec := variables.get("CLUSTER_SPEC"):
        machine = _parse_cluster_spec(spec)
    elif {"NODE_RANK", "MASTER_ADDR", "MASTER_PORT"} <= variables.keys() and config.nodes > 1:
        machine = Topology(
            int(variables["NODE_RANK"]), config.nodes, variables["MASTER_ADDR"], int(variables["MASTER_PORT"])
        )
    if config.nodes not in (1, machine.nodes):
        remedy = "start it with torchrun, a TrainJob or a CustomJob, or set NODE_RANK, MASTER_ADDR and MASTER_PORT"
        machines = "1 machine" if machine.nodes == 1 else f"{machine.nodes} machines"
        raise ConfigError(f"--nodes {config.nodes}: the environment describes {machines}; {remedy}")
    return machine


def must_launch(config: TrainingSettings) -> bool:
    """Whether this process must launch ranks: several, or the single one that DeepSpeed needs. A rank launches none.

    Raises ConfigError if the settings cannot use the requested number of ranks or machines.
    """
    if config.parallelism == "jax":
        _refuse_several_processes(config)
        return False
    if is_launched():
        return False
    count = config.devices * topology(config).nodes
    if config.parallelism == "single" and count > 1:
        raise ConfigError(f"--parallelism single: runs one rank, but {count} were requested; give ddp or deepspeed")
    check_batch(config, count)
    return count > 1 or config.parallelism == "deepspeed"


def check_batch(config: TrainingSettings, num_ranks: int) -> None:
    """Raises ConfigError if an update has fewer instances than there are ranks."""
    if config.batch_instances < num_ranks:
        remedy = f"give --batch-instances {num_ranks} or more, or fewer --devices"
        raise ConfigError(f"--batch-instances {config.batch_instances}: fewer than the {num_ranks} ranks; {remedy}")


def _refuse_several_processes(config: TrainingSettings) -> None:
    """Raises ConfigError for several machines or processes: JAX trains in one process on one machine."""
    nodes = config.nodes if config.nodes > 1 else topology(config).nodes
    if nodes > 1:
        raise ConfigError(f"--parallelism jax: runs on one machine, but {nodes} were requested; give ddp or deepspeed")
    if is_launched() and int(os.environ["WORLD_SIZE"]) > 1:
        remedy = "start it without torchrun, or with one process"
        raise ConfigError(f"--parallelism jax: one process drives all devices, but there are several; {remedy}")


def launch_ranks(step: str, config: TrainingSettings, progress: Progress) -> Manifest:
    """Runs the step in `config.devices` processes on this machine and returns the manifest of the output.

    Raises the error of the rank that failed, or TrainingError. SIGTERM and Ctrl-C are forwarded as SIGTERM, on which
    the ranks write a checkpoint; if this process is killed, so are the ranks.
    """
    if torch.cuda.is_available() and torch.cuda.device_count() < config.devices:
        count = torch.cuda.device_count()
        raise ConfigError(f"--devices {config.devices}: this machine has {count} GPUs; give --devices {count} or less")
    report_reader, report_writer = os.pipe()
    alive_reader, alive_writer = os.pipe()
    command = [sys.executable, "-m", "cappy.training", step, encode(to_values(config))]
    machine = topology(config)
    machine = replace(machine, port=machine.port or _free_port())
    ranks = [
        subprocess.Popen(  # noqa: S603 (our own interpreter and module)
            command,
            env=_rank_environment(machine, config.devices, local_rank, f"{report_writer},{alive_reader}"),
            pass_fds=(report_writer, alive_reader),
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else subprocess.DEVNULL,
        )
        for local_rank in range(config.devices)
    ]
    os.close(report_writer)
    os.close(alive_reader)
    try:
        with _forward_signals(ranks):
            return _follow(ranks, report_reader, progress)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        os.close(report_reader)
        os.close(alive_writer)


def _follow(ranks: Sequence["subprocess.Popen[bytes]"], report_reader: int, progress: Progress) -> Manifest:
    """Reads reports until all ranks have ended; raises the error of the first one that failed."""
    reports = RankReport()
    deadline = float("inf")
    for message in _read_reports(report_reader, lambda: any(rank.poll() is None for rank in ranks)):
        if "progress" in message:
            done, total, unit, resumed, note = message["progress"]
            progress(done, total, unit=unit, resumed=resumed, note=note)
        reports = message | reports  # Keeps the first report of each kind.
        if any(rank.poll() for rank in ranks):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > deadline:
            break
    failed = [(index, rank.poll()) for index, rank in enumerate(ranks) if rank.poll()]
    if not failed and "manifest" in reports:
        return Manifest.from_json(reports["manifest"])
    if "error" in reports:
        kind, text = reports["error"]
        raise getattr(errors, kind)(text)
    signalled = [(index, status) for index, status in failed if status is not None and status < 0]
    if signalled:
        index, status = signalled[0]
        raise TrainingError(f"rank {index} was killed by signal {-status}; {CONTINUE_REMEDY} from the last checkpoint")
    sys.stderr.write(reports.get("traceback", ""))
    raise TrainingError(UNEXPECTED_ERROR if "traceback" in reports else NO_REPORT)


def _read_reports(report_reader: int, is_alive: Callable[[], bool]) -> Iterator[RankReport]:
    """Yields the ranks' messages, and an empty message at intervals, until all ranks have ended."""
    buffer = b""
    with selectors.DefaultSelector() as selector:
        selector.register(report_reader, selectors.EVENT_READ)
        while True:
            data = os.read(report_reader, 2**16) if selector.select(0.2) else None
            *lines, buffer = (buffer + (data or b"")).split(b"\n")
            yield from map(json.loads, lines)
            if data == b"" or (data is None and not is_alive()):
                return
            yield RankReport()


def _rank_environment(machine: Topology, devices: int, local_rank: int, descriptors: str) -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    threads = max(1, (os.cpu_count() or 1) // devices)
    return {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", "")))),
        "RANK": str(machine.node * devices + local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(machine.nodes * devices),
        "LOCAL_WORLD_SIZE": str(devices),
        "MASTER_ADDR": machine.address,
        "MASTER_PORT": str(machine.port),
        REPORT_VARIABLE: descriptors,
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _has_descriptor(stream: TextIO) -> bool:
    """Whether the stream has a file descriptor for a child process; streams of tests and notebooks may have none."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        return int(stream.fileno()) >= 0
    return False


@contextlib.contextmanager
def _forward_signals(ranks: Sequence["subprocess.Popen[bytes]"]) -> Iterator[None]:
    def terminate(signal_number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            rank.terminate()

    try:
        previous_handler = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # Not the main thread, where no handler can be installed.
        yield
        return
    try:
        yield
    except KeyboardInterrupt:
        terminate(signal.SIGINT, None)
        with contextlib.suppress(subprocess.TimeoutExpired):
            for rank in ranks:
                rank.wait(GRACE_SECONDS)
        raise
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


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
        raise ConfigError(
            f"CLUSTER_SPEC: {quote(spec)} is not in Vertex AI's format; unset it or correct it"
        ) from error
