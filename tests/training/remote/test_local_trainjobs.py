"""A step that trains as a TrainJob of two nodes, for real but for the cluster: the Trainer SDK's local processes.

What the local backend cannot show is Kubernetes' own part: that the API server takes the TrainJob, that pods find each
other, that a deleted TrainJob's pods get SIGTERM.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from waiting import wait_until
from wording import assert_names

from cappy.config import encode, to_values
from cappy.records.folder import verify
from cappy.training.finetuning import FinetuningConfig, run

pytest.importorskip(
    "kubeflow.trainer", reason="the Kubeflow Trainer SDK is not installed: pip install 'cappy-scorer[train]'"
)
pytestmark = pytest.mark.timeout(900)  # Processes start one after another, on a busy machine for minutes.
Plan = Callable[..., FinetuningConfig]
ROOT = Path(__file__).parents[3]
PROGRAM = ROOT / "tests/fakes/local_trainjobs.py"
TWO = {"parallelism": "ddp", "epochs": 1.0}


class Step:
    """A component: a shell, in it the step, and beneath that the job's processes; all it says in `said`."""

    def __init__(self, plan: FinetuningConfig) -> None:
        given = to_values(plan)
        self.plan, self.log = plan, plan.work.parent / "log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, str(PROGRAM), "finetuning", encode(given), given["source"], given["target"]]
        with self.log.open("wb") as log:
            # The line after it keeps the shell from becoming the step, as kfp's own lines do.
            self.shell = subprocess.Popen(
                ["sh", "-ec", f"{' '.join(words)}\ntrue"],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=plan.work.parent,
                env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{PROGRAM.parent}", "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self.log.read_text()

    def processes(self, words: str) -> list[psutil.Process]:
        """The living of this session whose command line has the words, whoever their parent is by now."""
        result = []
        for process in psutil.process_iter(["pid", "cmdline"]):
            try:
                ours = os.getsid(process.pid) == self.shell.pid and process.status() != psutil.STATUS_ZOMBIE
                if ours and words in " ".join(process.cmdline()):
                    result.append(process)
            except (ProcessLookupError, psutil.Error):
                continue
        return result

    def wait_until(self, condition: Callable[[], object], what: str, seconds: float = 300) -> None:
        wait_until(condition, what, seconds=seconds, pause=0.05, details=lambda: self.said[-3000:])

    def checkpoint(self, update: int) -> bool:
        return bool(list(self.plan.work.glob(f"finetuning/*/.checkpoints/{update:09d}")))


@pytest.fixture
def start() -> Iterator[Callable[[FinetuningConfig], Step]]:
    """start(plan) -> the step's processes; what is left of them goes with the test."""
    steps: list[Step] = []

    def make(plan: FinetuningConfig) -> Step:
        steps.append(Step(plan))
        return steps[-1]

    yield make
    for step in steps:
        for process in step.processes(""):
            process.kill()
        step.shell.wait()


def equal(first: FinetuningConfig, second: FinetuningConfig) -> bool:
    one, two = (load_file(plan.target / "model.safetensors") for plan in (first, second))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_job_whose_ranks_are_killed_is_submitted_again_and_publishes_what_an_unbroken_run_here_gives(
    plan: Plan, start: Callable[[FinetuningConfig], Step]
) -> None:
    settings = {**TWO, "epochs": 2.0, "patience": 10}
    here = run(plan("here", devices=2, **settings))
    remote = plan("there", launcher="trainjob", nodes=2, **settings)
    step = start(remote)
    step.wait_until(lambda: step.checkpoint(4), "checkpoint 4")
    for rank in step.processes("-m cappy.training finetuning"):
        rank.send_signal(signal.SIGKILL)
    assert step.shell.wait(250) == 0, step.said[-3000:]
    (again,) = [line for line in step.said.splitlines() if "submitted again" in line]
    update = int(again.rpartition(" ")[2])
    assert update >= 4
    assert f"({update} resumed)" in step.said, "updates before the checkpoint are not done again"
    assert "finetuning: node-0: finetuning: 15 of 15 updates" in step.said, "the job's log is told, node by node"
    assert "finetuning: node-1: " in step.said
    manifest = verify(remote.target)
    assert manifest.hash == here.hash
    assert equal(remote, plan("here"))
    assert manifest.metrics["updates"] == 15
    log = json.loads((remote.target / "training.json").read_text())
    assert log["checks"][-1]["update"] == log["curve"][-1]["update"] == 15
    record = json.loads((remote.work / "records" / "f.json").read_text())
    assert (record["status"], record["manifest_hash"]) == ("done", here.hash)
    (job,) = (remote.work / "jobs").iterdir()
    assert not (job / "source").exists(), "the staged input goes when it is not needed any more"
    repeated = start(remote)
    assert repeated.shell.wait(100) == 0, repeated.said[-3000:]
    assert "submitted" not in repeated.said, "what a job wrote is read, not trained again"


@pytest.mark.parametrize(("whom", "nodes"), [("shell", 1), ("step", 2)])
def test_a_step_that_is_cancelled_takes_its_job_with_it(
    whom: str, nodes: int, plan: Plan, start: Callable[[FinetuningConfig], Step]
) -> None:
    step = start(plan("there", launcher="trainjob", nodes=nodes, **{**TWO, "epochs": 500.0, "patience": 100}))
    step.wait_until(lambda: step.checkpoint(3), "checkpoint 3")
    (follower,) = [one for one in step.processes(PROGRAM.name) if one.name() != "sh"]
    assert len([one for one in step.processes("/train_cappy-finetuning-") if one.name() != "bash"]) == nodes
    # Of several nodes each starts its rank; one alone trains itself.
    assert len(step.processes("-m cappy.training finetuning")) == (nodes if nodes > 1 else 0)
    os.kill(step.shell.pid if whom == "shell" else follower.pid, signal.SIGTERM)
    step.wait_until(lambda: not step.processes(""), "the end of its processes", 60)
    why = "the process that started this step" if whom == "shell" else "SIGTERM"
    name = f"cappy-finetuning-{next((step.plan.work / 'finetuning').iterdir()).name}"
    assert step.said.splitlines()[-1].startswith(f"cappy finetuning: {name}: ")
    assert_names(step.said.splitlines()[-1], "cancelled", why, "same command")
    assert "SIGTERM after update" in step.said, "the ranks were asked, and wrote a checkpoint"
    assert not step.plan.target.exists()
