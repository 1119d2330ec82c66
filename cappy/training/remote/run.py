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
from cappy.records.work import JOBS, begin, job_name, lock_folder, mark_finished, must_start_over
from cappy.redaction import has_secret, redact
from cappy.runs import PROGRESS_VARIABLE
from cappy.steps import step_version
from cappy.training import checkpoint
from cappy.training.checkpoint import CONTINUES
from cappy.training.launch import DEFECT, NO_REPORT, VERSION_VARIABLE
from cappy.training.remote.following import CANCEL_SECONDS, Hooks, Jobs, Limits, cancellation, end_job, follow
from cappy.training.settings import LauncherSettings, TrainingSettings

POLL_SECONDS = 5.0
TRACKING_VARIABLE = "MLFLOW_TRACKING_URI"


def train_elsewhere(
    step: str, config: TrainingSettings, computed: Mapping[str, object], parents: Sequence[str], progress: Progress
) -> Manifest:
    """Trains as a job of `config.launcher`'s platform and publishes the scorer that it wrote; its manifest.

    `computed` and `parents` are what the work is named by, as it would be here: so the job continues at a checkpoint
    that was written here, and its name is the same when this step is retried.
    """
    key = work_key(step, computed, parents, fresh=config.fresh)
    name = job_name(step, key.name)
    # One that is being cancelled holds the work until its job has ended.
    with lock_folder(config.work / JOBS / name, timeout=2 * CANCEL_SECONDS) as folder:
        written, staged = folder / "target", folder / "source"
        inner = dataclasses.replace(config, **_here(), source=staged, target=written)

        def jobs() -> Jobs:
            return jobs_of(step, config, inner, _environment(folder, step))

        if must_start_over(folder, key):  # A job of the work before still reads its input, and would be followed.
            end_job(jobs(), name, lambda text: _tell(step, text))
        begin(folder, key)
        if not (written / MANIFEST).is_file():
            _stage(config.source, staged)
            _follow(jobs(), name, step, config, written, key.name, progress)
        manifest = _verify(written, step, computed, parents, name)
        publish(written, config.target, manifest)
        mark_finished(folder)
        shutil.rmtree(folder / "source", ignore_errors=True)
        return manifest


def _here() -> dict[str, Any]:
    """The settings of a training that runs in the process that has them."""
    return {field.name: field.default for field in dataclasses.fields(LauncherSettings)}


def jobs_of(step: str, config: TrainingSettings, inner: TrainingSettings, environment: Mapping[str, str]) -> Jobs:
    """The jobs of the platform that `config` names, which run `inner`."""
    if config.launcher == "trainjob":
        from cappy.training.remote.kubeflow import TrainJobs

        return TrainJobs(step, config, inner, environment)
    from cappy.training.remote.vertex import CustomJobs

    return CustomJobs(step, config, inner, environment)


def _follow(
    jobs: Jobs, name: str, step: str, config: TrainingSettings, written: Path, key: str, progress: Progress
) -> None:
    state_file = written.parent / f"{step}.json"
    with contextlib.suppress(FileNotFoundError):
        state_file.unlink()

    def look() -> None:
        with contextlib.suppress(OSError, ValueError, TypeError):  # A file that is just being replaced.
            if state := read_state(state_file):
                progress(state.done, state.total, unit=state.unit, resumed=state.resumed, note=state.note)

    with cancellation() as cancelled:
        hooks = Hooks(
            checkpoint=lambda: checkpoint.newest_update(config.work / step / key / ".checkpoints"),
            cancelled=cancelled,
            written=(written / MANIFEST).is_file,
            tell=lambda text: _tell(step, text),
            look=look,
            said=lambda line: _mendable(step, line),
        )
        limits = Limits(max_restarts=config.max_restarts, timeout=config.timeout_hours * 3600, poll=POLL_SECONDS)
        follow(jobs, name, limits, hooks)


def _tell(step: str, text: str) -> None:
    # Lines of the job's log are among them.
    sys.stderr.write(f"{step}: {redact(text)}\n")
    sys.stderr.flush()


def _mendable(step: str, line: str) -> str:
    """What a rank said a person has to mend; nothing of one that continues, or that another's end took with it."""
    words = line.partition(f"cappy {step}: ")[2]
    return "" if CONTINUES in words or words in (DEFECT, NO_REPORT) else words


def _environment(folder: Path, step: str) -> dict[str, str]:
    """The environment of a job's processes; an address that holds a password is left out."""
    variables = {VERSION_VARIABLE: str(step_version(step)), PROGRESS_VARIABLE: str(folder)}
    tracking = os.environ.get(TRACKING_VARIABLE, "")
    return variables | ({TRACKING_VARIABLE: tracking} if tracking and not has_secret(tracking) else {})


def _stage(source: Path, staged: Path) -> None:
    """The input on the volume, by hard links where it lies there already; one that a job may be reading stays."""
    manifest = read_manifest(source)
    if not (staged / MANIFEST).is_file() or read_manifest(staged).hash != manifest.hash:
        publish(source, staged, manifest)


def _verify(written: Path, step: str, computed: Mapping[str, object], parents: Sequence[str], name: str) -> Manifest:
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
