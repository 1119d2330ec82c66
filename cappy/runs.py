"""What the parts of a run leave for each other: names of environment variables, and a record of each step."""

import json
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cappy.untrusted import JSON

PROGRESS_VARIABLE = "CAPPY_PROGRESS"
"""Environment: folder where a local run's steps write how far they are."""
PACKAGE = "pipeline.yaml"
"""The compiled pipeline of a local run, in the same folder."""
PARENT_VARIABLE = "CAPPY_PARENT"
"""Environment: file that a local run's parent holds locked for as long as it lives."""
TIMEOUT_VARIABLE = "CAPPY_TIMEOUT"
"""Environment: seconds that a step may take; Vertex AI has no such limit for the steps of a pipeline."""
ORCHESTRATOR: ContextVar[int | None] = ContextVar("orchestrator", default=None)
"""The process that started this one to do a step, as it was when the step began; None where a person did."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What one execution of a step did; tracking turns it into an MLflow run.

    `fingerprint` names what was asked for, with `-i/N` where a shard of it was, and `run` the pipeline run that
    executed it: a later run whose step came from the cache finds the record under the same fingerprint with an older
    run's id.
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


def record_path(work: Path, fingerprint: str) -> Path:
    """Where the record of the step with this fingerprint lies."""
    return work / "records" / f"{fingerprint.replace('/', '-of-')}.json"


def progress_path(folder: Path, step: str, fingerprint: str) -> Path:
    """Where a step of a local run tells how far it is: shards of a step tell it each for itself."""
    shard = fingerprint.partition("-")[2].replace("/", "-of-")
    return folder / f"{step}{shard and '-'}{shard}.json"


def read_record(work: Path, fingerprint: str) -> StepRecord | None:
    """The record of the last execution under this fingerprint, or None if there was none."""
    path = record_path(work, fingerprint)
    return StepRecord(**json.loads(path.read_text())) if path.is_file() else None
