"""One rank of a training step, however it was started.

    torchrun --nproc-per-node 2 -m cappy.training finetuning '{"source": "annotated", "target": "scorer"}'

is what a TrainJob runs; a Vertex AI CustomJob runs the same with `python -m`, once per machine. Settings are JSON, or
encoded as the components encode them.
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
from cappy.progress import FileProgress, LineProgress, Progress, silent
from cappy.redaction import redact
from cappy.runs import PROGRESS_VARIABLE
from cappy.steps import TRAINING_STEPS, step_version
from cappy.training import finetuning, pretraining
from cappy.training.launch import REPORT_VARIABLE, VERSION_VARIABLE, Report

ATOMIC = 1000
"""Characters of a message: even as escaped JSON within 4,096 bytes or so, which a pipe takes whole from each rank."""
Send = Callable[[Report], None]


def main(arguments: Sequence[str]) -> NoReturn:
    """Runs the step and ends the process: status 1 after a CappyError, which the first rank says in one line."""
    try:
        status = _ran(arguments)
    except BaseException:  # noqa: BLE001 (shown, as the interpreter would)
        sys.stderr.write(redact(traceback.format_exc()))
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: threads of torch's and of DeepSpeed's that still run while the interpreter is torn down abort the
    # process now and then, and a rank whose work is done would count as one that failed.
    os._exit(status)


def _ran(arguments: Sequence[str]) -> int:
    pipes = os.environ.pop(REPORT_VARIABLE, "")
    if not pipes:
        return _alone(arguments)
    report, life = map(int, pipes.split(","))
    threading.Thread(target=_end_with_parent, args=(life,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then asks us to end.
    return _run_and_report(arguments, lambda message: _write(report, message))


def _alone(arguments: Sequence[str]) -> int:
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
    """For a job: a file on the volume that the step which submitted it reads, and a line in the log now and then."""
    folder = os.environ.get(PROGRESS_VARIABLE)
    if not folder or not arguments:
        return silent
    step = arguments[0]
    in_file = FileProgress(Path(folder) / f"{step}.json")
    in_log = LineProgress(lambda text: sys.stderr.write(f"{step}: {text}\n"))

    def progress(done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = "") -> None:
        with contextlib.suppress(OSError):  # A volume that is away for a moment must not end the training.
            in_file(done, total, unit=unit, resumed=resumed, note=note)
        in_log(done, total, unit=unit, resumed=resumed, note=note)

    return progress


def _run_and_report(arguments: Sequence[str], report: Send) -> int:
    """Runs the step and tells the process that started us how far it is and what came of it."""

    def progress(done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = "") -> None:
        report({"progress": (done, total, unit, resumed, note)})

    try:
        manifest = _run(arguments, progress)
        if os.environ["LOCAL_RANK"] == "0":
            report({"manifest": manifest})
    except CappyError as error:
        report({"error": (type(error).__name__, str(error)[:ATOMIC])})
        return 1
    except Exception:  # noqa: BLE001 (reported to the parent, which shows the first rank's that failed)
        report({"defect": redact(traceback.format_exc())[-ATOMIC:]})
        return 1
    return 0


def _run(arguments: Sequence[str], progress: Progress) -> str:
    if len(arguments) != 2 or arguments[0] not in TRAINING_STEPS:
        raise ConfigError(f"give a step ({', '.join(TRAINING_STEPS)}) and its settings, got {quote(list(arguments))}")
    step, text = arguments
    own = str(step_version(step))
    if (asked := os.environ.get(VERSION_VARIABLE, own)) != own:
        remedy = "build both images from one commit"
        raise ConfigError(f"the job's image has {step} in version {own}, the step that submitted it {asked}; {remedy}")
    values = json.loads(text) if text.startswith("{") else decode(text)
    if step == "pretraining":
        return pretraining.run(build(pretraining.PretrainingConfig, values), progress).to_json()
    if step != "finetuning":
        raise ConfigError(f"{step}: is not trained by this module")
    return finetuning.run(build(finetuning.FinetuningConfig, values), progress).to_json()


def _write(report: int, message: Report) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(report, data) :]


def _end_with_parent(life: int) -> None:
    os.read(life, 1)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
