"""What the processes of a run share: environment variables, records of steps, and how memory is collected."""

import atexit
import gc
import json
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cappy.untrusted import JSON

PROGRESS_VARIABLE = "CAPPY_PROGRESS"
"""Environment variable: folder that the steps of a local run write their progress to."""
RUN_PACKAGE_FILE = "pipeline.yaml"
"""File name of the compiled pipeline of a local run, in the same folder."""
PARENT_VARIABLE = "CAPPY_PARENT"
"""Environment variable: lock file that the parent process of a local run holds while it runs."""
RUN_VARIABLE = "CAPPY_RUN"
"""Environment variable: id of the pipeline run. It is no parameter of cached steps, and no constant of their
containers, because both belong to the key of kfp's cache (Kubeflow Pipelines, backend/src/v2/cacheutils/cache.go): no
run would reuse a step of another. On Kubeflow it is a label of the pod. Steps of a Vertex AI pipeline do not have it.
"""
TIMEOUT_VARIABLE = "CAPPY_TIMEOUT"
"""Environment variable: time limit of a step in seconds; Vertex AI has no limit for steps of a pipeline."""
ACCELERATORS_VARIABLE = "CAPPY_ACCELERATORS"
"""Environment variable: type and number of the accelerators of a step, such as nvidia-l4:2."""
ORCHESTRATOR: ContextVar[int | None] = ContextVar("orchestrator", default=None)
"""Id of the process that started this one to run a step; None if a person ran it.

It is read when the step starts, because the id of the parent changes if the parent dies.
"""

GC_THRESHOLD = 50_000
"""New objects between two garbage collections; Python's default of 700 collects hundreds of times during imports."""
_DEFAULT_THRESHOLDS = gc.get_threshold()


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """The record of one execution of a step; tracking turns it into an MLflow run.

    `fingerprint` identifies the work, with `-i/N` for a shard. `run` is the id of the pipeline run that executed it,
    empty if the step did not know it: a later run that takes the step from the cache reads the same record, with the id
    of the earlier run. `status` is `done` or `failed`. `started` is in seconds of `time.time`.
    """

    step: str
    fingerprint: str
    run: str
    status: str
    started: float
    seconds: float
    config: Mapping[str, "JSON"]
    target: str
    manifest_hash: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: str = ""


def tune_garbage_collector() -> None:
    """For a process that is ours: collects garbage less often, and not at exit.

    With torch and transformers loaded, Python would search a million objects for garbage when it exits, for a second.
    """
    gc.set_threshold(GC_THRESHOLD, 20, 20)
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)


def reset_garbage_collector() -> None:
    """Collects as often as Python's default again: a service has imported its modules and must free bodies soon."""
    gc.set_threshold(*_DEFAULT_THRESHOLDS)


def record_path(work: Path, fingerprint: str) -> Path:
    """Path of the record of the step with this fingerprint."""
    return work / "records" / f"{fingerprint.replace('/', '-of-')}.json"


def progress_path(folder: Path, step: str, fingerprint: str) -> Path:
    """Path of the progress file of a step of a local run; every shard has its own."""
    shard = fingerprint.partition("-")[2].replace("/", "-of-")
    return folder / f"{step}{shard and '-'}{shard}.json"


def read_record(work: Path, fingerprint: str) -> StepRecord | None:
    """The record of the last execution under this fingerprint, or None if there was none."""
    path = record_path(work, fingerprint)
    return StepRecord(**json.loads(path.read_text())) if path.is_file() else None
