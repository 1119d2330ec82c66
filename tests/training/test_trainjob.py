"""The TrainJob's function runs for real under the Trainer SDK's local backend, two nodes that meet over gloo."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cappy.config import encode, to_values
from cappy.records.folder import verify
from cappy.training.finetuning import FinetuningConfig
from cappy.training.trainjob import trainer

pytest.importorskip(
    "kubeflow.trainer", reason="the Kubeflow Trainer SDK is not installed: pip install 'cappy-scorer[train]'"
)
Plan = Callable[..., FinetuningConfig]
ROOT = Path(__file__).parents[2]
NODE = """
import os, sys, sysconfig
from kubeflow import trainer as sdk
from cappy.config import build, decode
from cappy.training.finetuning import FinetuningConfig
from cappy.training.trainjob import trainer

settings, port, node = sys.argv[1:]
image = sdk.RuntimeTrainer(trainer_type=sdk.TrainerType.CUSTOM_TRAINER, framework="python", image="local")
runtime = sdk.Runtime(name="torch-distributed", kind=sdk.RuntimeKind.TRAINING_RUNTIME, trainer=image)
environment = {
    "PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join((os.getcwd(), sysconfig.get_paths()["purelib"])),
    "OMP_NUM_THREADS": "1", "NODE_RANK": node, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
}
client = sdk.TrainerClient(sdk.LocalProcessBackendConfig())
plan = build(FinetuningConfig, decode(settings))
name = client.train(runtime=runtime, trainer=trainer("finetuning", plan, environment=environment))
done = client.wait_for_job_status(name, status={"Complete", "Failed"}, timeout=200, polling_interval=1)
sys.exit(0 if done.status == "Complete" else "".join(client.get_job_logs(name)))
"""
"""One node's job in a process of its own: jobs of one process change its working directory under each other."""


def test_the_job_asks_for_the_nodes_of_the_plan(plan: Plan) -> None:
    job = trainer("finetuning", plan(nodes=3), image="trainer:1", resources={"gpu": 4}, environment={"A": "b"})
    assert (job.num_nodes, job.image, job.resources_per_node) == (3, "trainer:1", {"gpu": 4})
    assert job.env["A"] == "b"
    assert not job.packages_to_install


def test_two_nodes_started_by_the_trainer_sdk_publish_one_scorer(plan: Plan) -> None:
    """The local backend starts one process a job, whatever `num_nodes` says: so each node is a job of its own here.

    Its torch runtime wants torch installed anew into a fresh environment; ours is lent to a plain Python's instead.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = plan(nodes=2, strategy="ddp", epochs=1.0)
    command = [sys.executable, "-c", NODE, encode(to_values(settings)), str(port)]
    nodes = [
        subprocess.Popen([*command, str(node)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for node in range(2)
    ]
    for node in nodes:
        text, _ = node.communicate(timeout=240)
        assert node.returncode == 0, text[-3000:]
    manifest = verify(settings.target)
    assert manifest.metrics["updates"] == 8
    log = json.loads((settings.target / "training.json").read_text())
    assert log["checks"][-1]["update"] == log["curve"][-1]["update"] == 8
