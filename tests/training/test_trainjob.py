"""The TrainJob's function runs for real under the Trainer SDK's local backend, two nodes that meet over gloo."""

import json
import os
import socket
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cappy.records.folder import verify
from cappy.training.finetuning import FinetuningConfig
from cappy.training.trainjob import trainer

trainer_sdk = pytest.importorskip(
    "kubeflow.trainer", reason="the Kubeflow Trainer SDK is not installed: pip install 'cappy-scorer[train]'"
)
Plan = Callable[..., FinetuningConfig]


def test_the_job_asks_for_the_nodes_of_the_plan(plan: Plan) -> None:
    job = trainer("finetuning", plan(nodes=3), image="trainer:1", resources={"gpu": 4}, environment={"A": "b"})
    assert (job.num_nodes, job.image, job.resources_per_node) == (3, "trainer:1", {"gpu": 4})
    assert job.env["A"] == "b"
    assert not job.packages_to_install


@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")
def test_two_nodes_started_by_the_trainer_sdk_publish_one_scorer(plan: Plan) -> None:
    """The local backend starts one process a job, whatever `num_nodes` says: so each node is a job of its own here.

    Its torch runtime wants torch installed anew into a fresh environment; ours is lent to a plain Python's instead.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = plan(nodes=2, strategy="ddp", epochs=1.0)
    runtime: Any = trainer_sdk.Runtime(
        name="torch-distributed",
        kind=trainer_sdk.RuntimeKind.TRAINING_RUNTIME,
        trainer=trainer_sdk.RuntimeTrainer(
            trainer_type=trainer_sdk.TrainerType.CUSTOM_TRAINER, framework="python", image="local"
        ),
    )
    client = trainer_sdk.TrainerClient(trainer_sdk.LocalProcessBackendConfig())
    root = str(Path(__file__).parents[2])
    jobs = []
    for node in range(2):
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join((root, sysconfig.get_paths()["purelib"])),
            "OMP_NUM_THREADS": "1",
            "NODE_RANK": str(node),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        job = trainer("finetuning", settings, environment=environment)
        jobs.append(client.train(runtime=runtime, trainer=job))
    for name in jobs:
        done = client.wait_for_job_status(name, status={"Complete", "Failed"}, timeout=200, polling_interval=1)
        assert done.status == "Complete", "\n".join(client.get_job_logs(name))
    manifest = verify(settings.target)
    assert manifest.metrics["updates"] == 8
    log = json.loads((settings.target / "training.json").read_text())
    assert log[-1]["update"] == 8
