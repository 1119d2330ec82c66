"""Runs one rank of a training step, whichever launcher started it.

A TrainJob runs this command; a Vertex AI CustomJob runs the same module with `python -m`, once per machine:

    torchrun --nproc-per-node 2 -m cappy.training finetuning '{"source": "annotated", "target": "scorer"}'

Settings are JSON, or encoded with `cappy.config.encode`, as the components do.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from cappy.config import build, decode
from cappy.errors import CappyError, ConfigError, quote
from cappy.progress import FileProgress, LogProgress, Progress, silent
from cappy.redaction import redact
from cappy.runs import PROGRESS_VARIABLE, tune_garbage_collector
from cappy.steps import TRAINING_STEPS, step_version
from cappy.training import finetuning, pretraining
from cappy.training.launch import REPORT_VARIABLE, VERSION_VARIABLE, RankReport

MAX_MESSAGE_CHARACTERS = 1000
"""Maximum length of an error text in a report: as JSON usually within the 4,096 bytes that a pipe writes atomically."""
Send = Callable[[RankReport], None]


def main(arguments: Sequence[str]) -> NoReturn:
    """Runs the step and exits: status 1 after a CappyError, which is printed as one line."""
    tune_garbage_collector()
    try:
        status = _run_process(arguments)
    except BaseException:  # noqa: BLE001 (prints the traceback, like the interpreter)
        sys.stderr.write(redact(traceback.format_exc()))
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: threads of torch and DeepSpeed that still run during interpreter shutdown sometimes abort the
    # process, and a rank that has finished would count as failed.
    os._exit(status)


def _run_process(arguments: Sequence[str]) -> int:
    descriptors = os.environ.pop(REPORT_VARIABLE, "")
    if not descriptors:
        return _run_and_print(arguments)
    report_descriptor, parent_descriptor = map(int, descriptors.split(","))
    threading.Thread(target=_exit_with_parent, args=(parent_descriptor,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent handles Ctrl-C and sends us SIGTERM.
    return _run_and_report(arguments, lambda message: _send(report_descriptor, message))


def _run_and_print(arguments: Sequence[str]) -> int:
    try:
        metrics = json.loads(_run(arguments, _job_progress(arguments)))["metrics"]
        if "trial_updates" in metrics and os.environ.get("RANK", "0") == "0":
            from cappy.training.meter import describe_trial

            sys.stdout.write(f"{describe_trial(metrics)}\n")
    except CappyError as error:
        sys.stderr.write(f"cappy {' '.join(arguments[:1])}: {error}\n")
        return 1
    return 0


def _job_progress(arguments: Sequence[str]) -> Progress:
    """Progress of a job: written to a file on the volume for the step that submitted it, and logged at intervals."""
    folder = os.environ.get(PROGRESS_VARIABLE)
    if not folder or not arguments:
        return silent
    step = arguments[0]
    file_progress = FileProgress(Path(folder) / f"{step}.json")
    log_progress = LogProgress(lambda text: sys.stderr.write(f"{step}: {text}\n"))

    def progress(done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = "") -> None:
        with contextlib.suppress(OSError):  # A volume that is briefly unavailable must not end the training.
            file_progress(done, total, unit=unit, resumed=resumed, note=note)
        log_progress(done, total, unit=unit, resumed=resumed, note=note)

    return progress


def _run_and_report(arguments: Sequence[str], report: Send) -> int:
    """Runs the step and reports its progress and its result to the parent process; returns the exit status."""

    def progress(done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = "") -> None:
        report({"progress": (done, total, unit, resumed, note)})

    try:
        manifest = _run(arguments, progress)
        if os.environ["LOCAL_RANK"] == "0":
            report({"manifest": manifest})
    except CappyError as error:
        report({"error": (type(error).__name__, str(error)[:MAX_MESSAGE_CHARACTERS])})
        return 1
    except Exception:  # noqa: BLE001 (reported to the parent, which prints the traceback of the first failed rank)
        report({"traceback": redact(traceback.format_exc())[-MAX_MESSAGE_CHARACTERS:]})
        return 1
    return 0


def _run(arguments: Sequence[str], progress: Progress) -> str:
    if len(arguments) != 2 or arguments[0] not in TRAINING_STEPS:
        raise ConfigError(
            f"expected a step ({', '.join(TRAINING_STEPS)}) and its settings, got {quote(list(arguments))}"
        )
    step, encoded = arguments
    own_version = str(step_version(step))
    if (submitted_version := os.environ.get(VERSION_VARIABLE, own_version)) != own_version:
        remedy = "build both images from one commit"
        raise ConfigError(
            f"the job's image has version {own_version} of {step}, the step that submitted it has {submitted_version}; "
            f"{remedy}"
        )
    values = json.loads(encoded) if encoded.startswith("{") else decode(encoded)
    if step == "pretraining":
        return pretraining.run(build(pretraining.PretrainingConfig, values), progress).to_json()
    if step != "finetuning":
        raise ConfigError(f"{step}: this module runs {' and '.join(TRAINING_STEPS)} only")
    return finetuning.run(build(finetuning.FinetuningConfig, values), progress).to_json()


def _send(descriptor: int, message: RankReport) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(descriptor, data) :]


def _exit_with_parent(parent_descriptor: int) -> None:
    """Waits until the parent exits, which closes its end of the pipe, and then kills this process."""
    os.read(parent_descriptor, 1)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
