"""How an orchestrator's worker runs one step: with progress, a record, a time limit, and no life after its parent."""

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
from cappy.progress import FileProgress, Progress, silent
from cappy.records import Manifest
from cappy.records.folder import write_bytes
from cappy.redaction import redact, redact_output
from cappy.runs import (
    ORCHESTRATOR,
    PARENT_VARIABLE,
    PROGRESS_VARIABLE,
    TIMEOUT_VARIABLE,
    StepRecord,
    progress_path,
    record_path,
)
from cappy.secrets import fill_environment
from cappy.steps import STEP_SPECS

GRACE_SECONDS = 60.0
"""How long a step that took too long may write its checkpoint."""
ORPHAN_SECONDS = 8.0
"""What a step whose parent went may take to write a checkpoint or to cancel a job; less than the next run waits."""


class StepConfig(Protocol):
    """What the settings of every step have."""

    @property
    def target(self) -> Path:
        """Folder to write."""

    @property
    def work(self) -> Path:
        """Folder of unfinished and finished work."""

    @property
    def fresh(self) -> str:
        """Name of the run that asked for the work to be done again; empty if none did."""


def config_class(step: str) -> type[StepConfig]:
    """The class of a step's settings; imports the step's module."""
    config: type[StepConfig] = getattr(importlib.import_module(STEP_SPECS[step].module), f"{step.capitalize()}Config")
    return config


def runner(step: str) -> Callable[[StepConfig, Progress], Manifest]:
    """The `run` function of a step, which takes settings of the step's own class; imports the step's module."""
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
    """Runs a step as an orchestrator's worker does: settings decoded, progress to a file, a record of what was done.

    `part` is the shard i/N that this execution does; each leaves a record of its own. A CappyError ends the process
    with status 1 and its one line on stderr. The process dies with the local run that started it, so that no orphan
    goes on writing.
    """
    ORCHESTRATOR.set(os.getppid())
    redact_output()
    die_with_parent()
    _end_in_time(step)
    fingerprint = f"{fingerprint}-{part}" if part else fingerprint
    try:
        fill_environment()
        config = build(config_class(step), {**decode(settings), **values})
        if getattr(config, "dry_run", False):
            raise ConfigError(f"{step}: --dry-run leaves nothing for the next step; run it as cappy {step} --dry-run")
    except CappyError as error:
        sys.stderr.write(f"cappy {step}: {error}\n")
        raise SystemExit(1) from error
    started = time.time()
    outcome: _Outcome = {"status": "failed"}
    stated = to_values(config)
    try:
        manifest = runner(step)(config, _progress(step, fingerprint))
        stated |= manifest.config  # What a preset stood for.
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
            run=run,
            started=started,
            seconds=time.time() - started,
            config=stated,
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


def hold_parent_lock(path: Path) -> int:
    """Locks `path` for the life of this process and returns the descriptor; children wait for the lock to fall."""
    with open_lock(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return os.dup(file.fileno())


def die_with_parent() -> None:
    """Ends this process when the local run that started it ends, however that went; nothing elsewhere."""
    path = os.environ.get(PARENT_VARIABLE)
    if path:
        threading.Thread(target=_wait_for_parent, args=(path,), daemon=True).start()


def _wait_for_parent(path: str) -> None:
    """Blocks until the parent's lock falls, which the kernel does however the parent ended; then ends this process.

    SIGTERM ends most steps at once; training writes a checkpoint first, or cancels the job that it follows.
    """
    with open_lock(Path(path)) as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)


def _end_in_time(step: str) -> None:
    """Asks this process to end when the step's time is over, as an orchestrator would, and ends it if it does not."""
    seconds = float(os.environ.get(TIMEOUT_VARIABLE) or 0)
    if not seconds:
        return

    def end() -> None:
        sys.stderr.write(f"cappy {step}: took longer than {seconds:g} seconds; give it more hours in the recipe\n")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def _progress(step: str, fingerprint: str) -> Progress:
    folder = os.environ.get(PROGRESS_VARIABLE)
    return FileProgress(progress_path(Path(folder), step, fingerprint)) if folder else silent
