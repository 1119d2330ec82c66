"""Runs a training step as a job: stages its input, follows the job, verifies and publishes its output.

All files that the step and its job share are under the step's `work`, on a volume that the job's machines mount,
because the paths that an orchestrator gives a component for its input and output exist only in that component.
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
from cappy.progress import Progress, read_state
from cappy.records import Manifest, read_manifest
from cappy.records.folder import MANIFEST, disk_errors, publish, verify
from cappy.records.work import JOBS, begin, job_name, lock_folder, mark_finished, must_start_over
from cappy.redaction import has_secret, redact
from cappy.runs import PROGRESS_VARIABLE
from cappy.steps import step_version, work_key
from cappy.training import checkpoint
from cappy.training.checkpoint import CONTINUE_REMEDY
from cappy.training.launch import NO_REPORT, UNEXPECTED_ERROR, VERSION_VARIABLE
from cappy.training.remote.following import CANCEL_SECONDS, Hooks, Jobs, PollLimits, cancellation, end_job, follow
from cappy.training.settings import LauncherSettings, TrainingSettings

POLL_SECONDS = 5.0
TRACKING_VARIABLE = "MLFLOW_TRACKING_URI"


def train_remotely(
    step: str,
    config: TrainingSettings,
    result_settings: Mapping[str, object],
    parents: Sequence[str],
    progress: Progress,
) -> Manifest:
    """Trains in a job on the platform `config.launcher`, publishes the scorer it wrote and returns the manifest.

    `result_settings` and `parents` identify the work, as in training without a job. So the job continues from a
    checkpoint that training without a job wrote, and it has the same name when this step is retried.

    Raises TrainingError if the job fails, and FolderError if its output is damaged.
    """
    key = work_key(step, result_settings, parents, fresh=config.fresh)
    name = job_name(step, key.name)
    # A step that is being cancelled holds the lock until its job has ended.
    with lock_folder(config.work / JOBS / name, timeout=2 * CANCEL_SECONDS) as folder:
        output, staged_input = folder / "target", folder / "source"
        job_config = dataclasses.replace(config, **_local_settings(), source=staged_input, target=output)

        def open_platform() -> Jobs:
            return open_jobs(step, config, job_config, _job_environment(folder, step))

        if must_start_over(folder, key):  # A job of earlier work may still be running; it must not be followed.
            end_job(open_platform(), name, lambda text: _log(step, text))
        begin(folder, key)
        if not (output / MANIFEST).is_file():
            _stage(config.source, staged_input)
            _follow(open_platform(), name, step, config, output, key.name, progress)
        manifest = _verify(output, step, result_settings, parents, name)
        publish(output, config.target, manifest)
        mark_finished(folder)
        shutil.rmtree(folder / "source", ignore_errors=True)
        return manifest


def _local_settings() -> dict[str, Any]:
    """The default launcher settings, so that the job trains in its own processes and submits no other job."""
    return {field.name: field.default for field in dataclasses.fields(LauncherSettings)}


def open_jobs(
    step: str, config: TrainingSettings, job_config: TrainingSettings, environment: Mapping[str, str]
) -> Jobs:
    """Connects to the platform `config.launcher`; its jobs run the step with `job_config`."""
    if config.launcher == "trainjob":
        from cappy.training.remote.kubeflow import TrainJobs

        return TrainJobs(step, config, job_config, environment)
    from cappy.training.remote.vertex import CustomJobs

    return CustomJobs(step, config, job_config, environment)


def _follow(
    jobs: Jobs, name: str, step: str, config: TrainingSettings, output: Path, key: str, progress: Progress
) -> None:
    progress_file = output.parent / f"{step}.json"
    with contextlib.suppress(FileNotFoundError):
        progress_file.unlink()

    def report_progress() -> None:
        with contextlib.suppress(OSError, ValueError, TypeError):  # The job may be replacing the file.
            if state := read_state(progress_file):
                progress(state.done, state.total, unit=state.unit, resumed=state.resumed, note=state.note)

    with cancellation() as cancel_reason:
        hooks = Hooks(
            checkpoint_update=lambda: checkpoint.newest_update(config.work / step / key / ".checkpoints"),
            cancel_reason=cancel_reason,
            output_exists=(output / MANIFEST).is_file,
            log=lambda text: _log(step, text),
            on_poll=report_progress,
            find_error=lambda line: _user_error(step, line),
        )
        limits = PollLimits(max_restarts=config.max_restarts, timeout=config.timeout_hours * 3600, poll=POLL_SECONDS)
        follow(jobs, name, limits, hooks)


def _log(step: str, text: str) -> None:
    # Redacted, because lines of the job's log are written here too.
    sys.stderr.write(f"{step}: {redact(text)}\n")
    sys.stderr.flush()


def _user_error(step: str, line: str) -> str:
    """The error in a rank's log line that the user must fix, "" if there is none.

    Ignores errors after which the run continues from its checkpoint, and of ranks that ended because another failed.
    """
    message = line.partition(f"cappy {step}: ")[2]
    return "" if CONTINUE_REMEDY in message or message in (UNEXPECTED_ERROR, NO_REPORT) else message


def _job_environment(folder: Path, step: str) -> dict[str, str]:
    """Environment variables of the job; MLflow's address is left out if it contains a password."""
    variables = {VERSION_VARIABLE: str(step_version(step)), PROGRESS_VARIABLE: str(folder)}
    tracking = os.environ.get(TRACKING_VARIABLE, "")
    return variables | ({TRACKING_VARIABLE: tracking} if tracking and not has_secret(tracking) else {})


def _stage(source: Path, staged_input: Path) -> None:
    """Publishes the input to the volume, by hard links if `source` is on it.

    The same input is not published again, because a job may be reading it.
    """
    manifest = read_manifest(source)
    if not (staged_input / MANIFEST).is_file() or read_manifest(staged_input).hash != manifest.hash:
        publish(source, staged_input, manifest)


def _verify(
    output: Path, step: str, result_settings: Mapping[str, object], parents: Sequence[str], name: str
) -> Manifest:
    """Verifies the files of the job's output, and that this work produced it; returns its manifest.

    Raises TrainingError if the output is missing or belongs to other work. Raises FolderError if it is damaged, after
    deleting it, so that the next run produces it again.
    """
    if not (output / MANIFEST).is_file():
        remedy = "give a --work on a volume that the job and this step both mount"
        raise TrainingError(f"{name}: succeeded, but {output} does not exist; {remedy}")
    try:
        manifest = verify(output)
    except FolderError:
        with disk_errors(output):
            shutil.rmtree(output)
        raise
    if (manifest.step, manifest.parents, dict(manifest.config)) != (step, tuple(parents), dict(result_settings)):
        raise TrainingError(f"{name}: {output} is the output of other work; delete it and run again")
    return manifest
