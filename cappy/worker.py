"""Runs one step in a worker of an orchestrator: progress, a record, a time limit, and exit when the parent exits."""

import fcntl
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Protocol, Required, TypedDict

from cappy.config import build, decode, to_values
from cappy.errors import CappyError, ConfigError
from cappy.files import open_lock
from cappy.google_cloud import fill_environment
from cappy.progress import FileProgress, Progress, silent
from cappy.records import Manifest
from cappy.records.folder import write_bytes
from cappy.redaction import redact, redact_output
from cappy.runs import (
    ACCELERATORS_VARIABLE,
    ORCHESTRATOR,
    PARENT_VARIABLE,
    PROGRESS_VARIABLE,
    RUN_VARIABLE,
    TIMEOUT_VARIABLE,
    StepRecord,
    progress_path,
    record_path,
    tune_garbage_collector,
)
from cappy.steps import STEP_SPECS

GRACE_SECONDS = 60.0
"""Time that a step gets to write its checkpoint after its time limit."""
ORPHAN_SECONDS = 8.0
"""Time that a step gets to write a checkpoint or cancel a job after its parent exited; below `work.WAIT_SECONDS`."""


class StepConfig(Protocol):
    """The settings that every step has."""

    @property
    def target(self) -> Path:
        """Folder to write."""

    @property
    def work(self) -> Path:
        """Folder of unfinished and finished work."""

    @property
    def fresh(self) -> str:
        """Name of the run that asked to redo the work; empty if none did."""


def config_class(step: str) -> type[StepConfig]:
    """The config class of a step; imports the step's module."""
    config: type[StepConfig] = getattr(importlib.import_module(STEP_SPECS[step].module), f"{step.capitalize()}Config")
    return config


def runner(step: str) -> Callable[[StepConfig, Progress], Manifest]:
    """The `run` function of a step, which takes that step's config; imports the step's module."""
    run: Callable[[StepConfig, Progress], Manifest] = importlib.import_module(STEP_SPECS[step].module).run
    return run


class _Outcome(TypedDict, total=False):
    """How a step ended: fields of its `StepRecord`."""

    status: Required[str]
    manifest_hash: str
    metrics: Mapping[str, float]
    error: str


def launch(
    step: str, settings: str = "", *, fingerprint: str = "", part: str = "", run: str = "", **values: object
) -> Manifest:
    """Runs a step in a worker; writes progress to a file, and a record of the execution, and returns the manifest.

    `settings` is a text of `cappy.config.encode`, `values` are further settings. `fingerprint` identifies the work, and
    `run` is the id of the pipeline run, by default that of the environment. `part` is the shard i/N of this
    execution; every shard writes its own record. A CappyError ends the process with status 1 and one line on stderr. If
    a local run started the process, it exits when that run exits.
    """
    ORCHESTRATOR.set(os.getppid())
    redact_output()
    tune_garbage_collector()
    die_with_parent()
    _start_timeout(step)
    fingerprint = f"{fingerprint}-{part}" if part else fingerprint
    try:
        fill_environment()
        check_accelerators()
        config = build(config_class(step), {**decode(settings), **values})
        if getattr(config, "dry_run", False):
            raise ConfigError(
                f"{step}: --dry-run writes nothing that the next step could read; run cappy {step} --dry-run instead"
            )
    except CappyError as error:
        sys.stderr.write(f"cappy {step}: {error}\n")
        raise SystemExit(1) from error
    started = time.time()
    outcome: _Outcome = {"status": "failed"}
    config_values = to_values(config)
    try:
        manifest = runner(step)(config, _progress(step, fingerprint))
        config_values |= manifest.config  # A preset is resolved by the step.
        outcome = {"status": "done", "manifest_hash": manifest.hash, "metrics": dict(manifest.metrics)}
    except CappyError as error:
        outcome["error"] = str(error).removeprefix(f"{step}: ")
        sys.stderr.write(f"cappy {step}: {outcome['error']}\n")
        raise SystemExit(1) from error
    except BaseException as error:
        outcome["error"] = redact(f"{type(error).__name__}: {error}")
        raise
    finally:
        record = StepRecord(
            step=step,
            fingerprint=fingerprint,
            run=run or os.environ.get(RUN_VARIABLE, ""),
            started=started,
            seconds=time.time() - started,
            config=config_values,
            target=str(config.target),
            **outcome,
        )
        text = json.dumps(asdict(record), indent=1).encode()
        try:
            write_bytes(record_path(config.work, fingerprint or f"{step}-{os.getpid()}"), text)
        except CappyError as error:
            sys.stderr.write(f"cappy {step}: {error}\n")
            raise SystemExit(1) from error
    return manifest


def check_accelerators() -> None:
    """Raises ConfigError unless this process sees the accelerators that its recipe requested.

    Otherwise the step would compute on the processor, beside accelerators that are paid for.
    """
    kind, _, number = os.environ.get(ACCELERATORS_VARIABLE, "").partition(":")
    if not kind:
        return
    count = _count_tpus() if kind.startswith("tpu-") else _count_gpus()
    if count < int(number):
        image = "trainer-tpu" if kind.startswith("tpu-") else "CUDA (worker-cuda, trainer-cuda)"
        raise ConfigError(
            f"the recipe requests {number} {kind}, but this container sees {count}; use an image with {image}, and "
            "check the node's driver and device plugin"
        )


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _count_tpus() -> int:
    from cappy.training.tpu.strategy import count_tpus

    return count_tpus()


def hold_parent_lock(path: Path) -> int:
    """Locks `path` until this process exits and returns the descriptor; children wait for the lock."""
    with open_lock(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return os.dup(file.fileno())


def die_with_parent() -> None:
    """Makes this process exit when the local run that started it exits; does nothing if no local run started it."""
    path = os.environ.get(PARENT_VARIABLE)
    if path:
        threading.Thread(target=_wait_for_parent, args=(path,), daemon=True).start()


def _wait_for_parent(path: str) -> None:
    """Waits for the parent's lock, which the kernel releases when the parent exits, then ends this process.

    SIGTERM ends most steps at once; training first writes a checkpoint, or cancels the job that it watches.
    """
    with open_lock(Path(path)) as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)


def _start_timeout(step: str) -> None:
    """Sends SIGTERM to this process when the time limit of the step is over, and SIGKILL `GRACE_SECONDS` later."""
    seconds = float(os.environ.get(TIMEOUT_VARIABLE) or 0)
    if not seconds:
        return

    def end() -> None:
        sys.stderr.write(
            f"cappy {step}: exceeded its time limit of {seconds:g} seconds; give it more hours in the recipe\n"
        )
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def _progress(step: str, fingerprint: str) -> Progress:
    folder = os.environ.get(PROGRESS_VARIABLE)
    return FileProgress(progress_path(Path(folder), step, fingerprint)) if folder else silent
