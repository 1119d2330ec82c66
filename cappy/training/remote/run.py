"""A training step as a job: its input staged where the job sees it, what it wrote published where the step was asked.

Everything that both sides need lies under the step's `work`, on a volume that the job's machines mount: an
orchestrator's own paths for a component's input and output exist in that component alone.
"""

import contextlib
import dataclasses
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cappy.errors import FolderError, TrainingError
from cappy.keys import work_key
from cappy.progress import Progress, read_state
from cappy.records import Manifest, read_manifest
from cappy.records.folder import MANIFEST, disk_errors, publish, verify
from cappy.records.work import begin, held
from cappy.redaction import has_secret, redact
from cappy.steps import step_version
from cappy.training import checkpoint
from cappy.training.ending import CONTINUES
from cappy.training.launch import DEFECT, UNTOLD, VERSION_VARIABLE
from cappy.training.plan import TrainingSettings
from cappy.training.remote.cancelling import cancellation
from cappy.training.remote.following import CANCEL_SECONDS, Jobs, Surroundings, Terms, follow
from cappy.training.remote.settings import LauncherSettings
from cappy.worker import PROGRESS_VARIABLE

POLL_SECONDS = 5.0
TRACKING_VARIABLE = "MLFLOW_TRACKING_URI"


def train_elsewhere(
    step: str, plan: TrainingSettings, computed: Mapping[str, Any], parents: Sequence[str], progress: Progress
) -> Manifest:
    """Trains as a job of `plan.launcher`'s platform and publishes the scorer that it wrote; its manifest.

    `computed` and `parents` are what the work is named by, as it would be here: so the job continues at a checkpoint
    that was written here, and its name is the same when this step is retried.
    """
    key = work_key(step, computed, parents, fresh=plan.fresh)
    name = f"cappy-{step}-{key.name}"
    # One that is being cancelled holds the work until its job has ended.
    with held(plan.work / "jobs" / name, patience=2 * CANCEL_SECONDS) as folder:
        begin(folder, key)
        written = folder / "target"
        if not (written / MANIFEST).is_file():
            staged = _staged(plan.source, folder / "source")
            inner = dataclasses.replace(plan, **_here(), source=staged, target=written)
            jobs = jobs_of(step, plan, inner, _environment(folder, step))
            _followed(jobs, name, step, plan, written, key.name, progress)
        manifest = _verified(written, step, computed, parents, name)
        publish(written, plan.target, manifest)
        shutil.rmtree(folder / "source", ignore_errors=True)
        return manifest


def _here() -> dict[str, Any]:
    """The settings of a training that runs in the process that has them."""
    return {field.name: field.default for field in dataclasses.fields(LauncherSettings)}


def jobs_of(step: str, plan: TrainingSettings, inner: TrainingSettings, environment: Mapping[str, str]) -> Jobs:
    """The jobs of the platform that `plan` names, which run `inner`."""
    if plan.launcher == "trainjob":
        from cappy.training.remote.kubeflow import TrainJobs

        return TrainJobs(step, plan, inner, environment)
    from cappy.training.remote.vertex import CustomJobs

    return CustomJobs(step, plan, inner, environment)


def _followed(
    jobs: Jobs, name: str, step: str, plan: TrainingSettings, written: Path, key: str, progress: Progress
) -> None:
    told = written.parent / f"{step}.json"
    with contextlib.suppress(FileNotFoundError):
        told.unlink()

    def look() -> None:
        with contextlib.suppress(OSError, ValueError, TypeError):  # A file that is just being replaced.
            if state := read_state(told):
                progress(state.done, state.total, unit=state.unit, resumed=state.resumed, note=state.note)

    with cancellation() as cancelled:
        around = Surroundings(
            checkpoint=lambda: checkpoint.newest_update(plan.work / step / key / ".checkpoints"),
            cancelled=cancelled,
            written=(written / MANIFEST).is_file,
            tell=lambda text: _tell(step, text),
            look=look,
            said=lambda line: _said(step, line),
        )
        terms = Terms(retries=plan.retries, timeout=plan.timeout_hours * 3600, poll=POLL_SECONDS)
        follow(jobs, name, terms, around)


def _tell(step: str, text: str) -> None:
    # Lines of the job's log are among them.
    sys.stderr.write(f"{step}: {redact(text)}\n")
    sys.stderr.flush()


def _said(step: str, line: str) -> str:
    """What a rank said a person has to mend; nothing of one that continues, or that another's end took with it."""
    words = line.partition(f"cappy {step}: ")[2]
    return "" if CONTINUES in words or words in (DEFECT, UNTOLD) else words


def _environment(folder: Path, step: str) -> dict[str, str]:
    """What a job's processes are told beside the settings; an address that holds a password is not."""
    told = {VERSION_VARIABLE: str(step_version(step)), PROGRESS_VARIABLE: str(folder)}
    tracking = os.environ.get(TRACKING_VARIABLE, "")
    return told | ({TRACKING_VARIABLE: tracking} if tracking and not has_secret(tracking) else {})


def _staged(source: Path, staged: Path) -> Path:
    """The input on the volume, by hard links where it lies there already; one that a job may be reading stays."""
    manifest = read_manifest(source)
    if not (staged / MANIFEST).is_file() or read_manifest(staged).hash != manifest.hash:
        publish(source, staged, manifest)
    return staged


def _verified(written: Path, step: str, computed: Mapping[str, Any], parents: Sequence[str], name: str) -> Manifest:
    """The manifest of what the job wrote, every file checked against it, once it is of the work that was asked for.

    A damaged output is deleted, so that the next run makes it again.
    """
    if not (written / MANIFEST).is_file():
        remedy = "let --work be on a volume that both mount"
        raise TrainingError(f"{name}: succeeded, and {written} is not there; {remedy}")
    try:
        manifest = verify(written)
    except FolderError:
        with disk_errors(written):
            shutil.rmtree(written)
        raise
    if (manifest.step, manifest.parents, dict(manifest.config)) != (step, tuple(parents), dict(computed)):
        raise TrainingError(f"{name}: {written} holds other work than was asked for; delete it and run again")
    return manifest
