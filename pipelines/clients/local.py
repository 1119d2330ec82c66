"""Client for runs on this machine: reads a run's state and logs from its folder."""

import fcntl
import json
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypedDict

from cappy.errors import ConfigError
from cappy.files import open_lock
from pipelines.clients import RunState, State, TaskState
from pipelines.recipe import Platform
from pipelines.states import log_section, read_states

RUNS = Path(".cappy/runs")
STATUS = "status.json"
"""The file with the exit status of a finished run."""


class PipelineSource(TypedDict, total=False):
    """What a local run executes: a recipe, as JSON values, on a platform, or the pipeline at `module:name`."""

    recipe: Mapping[str, object]
    platform: Platform
    pipeline: str


class Request(PipelineSource):
    """The request.json of a local run, written by `pipelines.local` and executed by `pipelines.execution`.

    `process` is the id of the process that started the run; `fingerprints` has one entry per step, or per shard.
    """

    arguments: Mapping[str, object]
    process: int
    work: str
    run: str
    pipeline_root: str
    cache_root: str
    fingerprints: Mapping[str, str]


class LocalClient:
    """Client of the runs under a folder, by default `.cappy/runs`."""

    def __init__(self, runs: Path = RUNS) -> None:
        self._runs = runs

    def submit(self, package: Path, arguments: Mapping[str, object], name: str) -> RunState:
        """Always raises ConfigError: a local run ends with the terminal that started it, so it cannot be submitted."""
        raise ConfigError("local: cannot submit a run to this machine; start it with cappy pipeline run")

    def get_state(self, run: str) -> RunState:
        """The state of a run, from its folder and the records in its work folder."""
        folder, request = self._read_request(run)
        alive, status = _is_locked(folder / "parent.lock"), _read_status(folder)
        states = read_states(
            request["fingerprints"],
            work=Path(request["work"]),
            progress=folder,
            run=run,
            alive=alive,
            succeeded=status == 0,
        )
        tasks = tuple(
            TaskState(step=each.step, state=each.state, seconds=each.seconds, error=each.error) for each in states
        )
        state: State = "running" if alive else "done" if status == 0 else "failed" if status else "cancelled"
        return RunState(run=run, state=state, url=str(folder / "run.log"), tasks=tasks)

    def logs(self, run: str, step: str) -> Iterator[tuple[str, str]]:
        """Yields the lines of a step, or of the whole run; raises ConfigError for an unknown step.

        Shards share one log, so a line of one shard may appear under the shard that started last.
        """
        folder, request = self._read_request(run)
        names = list(dict.fromkeys(name.partition(" ")[0] for name in request["fingerprints"]))
        if step and step not in names:
            raise ConfigError(f"{run}: has no step {step}; choose one of {', '.join(names)}")
        for name in names:
            if step in ("", name):
                lines = log_section(folder / "run.log", name, whole=False)
                yield from ((name, f"{name}: {line}") for line in lines)

    def cancel(self, run: str) -> None:
        """Sends SIGTERM to the process that started the run, which then stops its steps."""
        folder, request = self._read_request(run)
        if not _is_locked(folder / "parent.lock"):
            raise ConfigError(f"{run}: has ended; nothing to cancel")
        # Not SIGINT: processes that a script starts in the background ignore it.
        os.kill(int(request["process"]), signal.SIGTERM)

    def _read_request(self, run: str) -> tuple[Path, Request]:
        path = self._runs / run / "request.json"
        if not path.is_file():
            requests = sorted(self._runs.glob("*/request.json"), key=lambda path: path.stat().st_mtime)
            remedy = f"the last one is {requests[-1].parent.name}" if requests else "start one with cappy pipeline run"
            raise ConfigError(f"{run}: no such run under {self._runs}; {remedy}")
        values: Request = json.loads(path.read_text())
        return path.parent, values


def _is_locked(path: Path) -> bool:
    """Whether the process that started the run is alive: it holds the lock as long as it runs."""
    with open_lock(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _read_status(folder: Path) -> int | None:
    path = folder / STATUS
    return int(json.loads(path.read_text())["status"]) if path.is_file() else None
