"""A training step that trains as a TrainJob where there is no cluster: on the Trainer SDK's local-process backend.

python local_trainjobs.py STEP SETTINGS SOURCE TARGET

does what a component's body does. The backend starts one process a job whatever the nodes, so each node is a job of its
own here; and what a kubelet does to the pods of a deleted TrainJob is done to its processes, as the backend ends a
job's shell alone.
"""

import contextlib
import dataclasses
import itertools
import os
import signal
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
from kubeflow import trainer as sdk
from kubeflow.trainer.options import Name
from kubernetes import client as kubernetes
from processes import free_port

ROOT = str(Path(__file__).resolve().parents[2])
PHASES = {"Created": "Pending", "Running": "Running", "Complete": "Succeeded", "Failed": "Failed"}


class LocalTrainJobs:
    """What TrainJobs asks of a TrainerClient, and of the Kubernetes client beneath it."""

    def __init__(self) -> None:
        self.client = sdk.TrainerClient(sdk.LocalProcessBackendConfig())
        self.backend = SimpleNamespace(core_api=self, namespace="local")
        self.nodes: dict[str, list[str]] = {}
        self.stamps: dict[str, list[str]] = {}
        self.clock = itertools.count()
        # The backend's script installs pip into each node's environment, which takes longer than training does.
        self.without_pip = tempfile.mkdtemp()
        (Path(self.without_pip) / "ensurepip.py").touch()

    def train(self, runtime: str, trainer: Any, options: list[Any]) -> str:
        (name,) = [option.name for option in options if isinstance(option, Name)]
        image = sdk.RuntimeTrainer(trainer_type=sdk.TrainerType.CUSTOM_TRAINER, framework="python", image="local")
        port = str(free_port())
        self.nodes[name] = []
        for node in range(trainer.num_nodes):
            # Torch's own runtime would install torch anew into a fresh environment; ours is lent to a plain Python's.
            local = sdk.Runtime(name="torch-distributed", kind=sdk.RuntimeKind.TRAINING_RUNTIME, trainer=image)
            environment = {
                "PATH": os.environ["PATH"],
                "PYTHONPATH": os.pathsep.join((self.without_pip, ROOT, sysconfig.get_paths()["purelib"])),
                "OMP_NUM_THREADS": "1",
                **(
                    {"NODE_RANK": str(node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                    if trainer.num_nodes > 1
                    else {}
                ),
                **trainer.env,
            }
            started = dataclasses.replace(trainer, env=environment)
            one = self.client.train(runtime=local, trainer=started, options=[Name(f"{name}-{node}")])
            self.nodes[name].append(one)
            self.stamps.pop(one, None)
            time.sleep(0.5)  # Each changes this process's working directory while it starts.
        return name

    def get_job(self, name: str) -> Any:
        if name not in self.nodes:
            raise RuntimeError(f"Failed to get TrainJob: local/{name}") from kubernetes.ApiException(status=404)
        result = [self.client.get_job(node).status for node in self.nodes[name]]
        status = next((one for one in ("Failed", "Created", "Running") if one in result), "Complete")
        return SimpleNamespace(name=name, status=status)

    def delete_job(self, name: str) -> None:
        self.get_job(name)
        asked = [process for node in self.nodes[name] for process in processes(node)]
        for process in asked:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM)
        _, left = psutil.wait_procs(asked, 30)
        for process in left:
            process.kill()
        for node in self.nodes.pop(name):
            end = time.monotonic() + 10
            while self.client.get_job(node).status == "Running" and time.monotonic() < end:
                time.sleep(0.05)
            # Gone from here on, as a deleted pod's log is.
            sys.stderr.write("".join(f"{node}: {line}\n" for line in self.client.get_job_logs(node)))
            self.client.delete_job(node)

    def list_namespaced_pod(self, namespace: str, label_selector: str) -> Any:
        name = label_selector.partition("=")[2]
        return SimpleNamespace(items=[self.pod(node, index) for index, node in enumerate(self.nodes.get(name, []))])

    def pod(self, node: str, index: int) -> Any:
        labels = {
            "jobset.sigs.k8s.io/replicatedjob-name": "node",
            "batch.kubernetes.io/job-completion-index": str(index),
        }
        phase = PHASES[self.client.get_job(node).status]
        return kubernetes.V1Pod(
            metadata=kubernetes.V1ObjectMeta(name=node, labels=labels), status=kubernetes.V1PodStatus(phase=phase)
        )

    def read_namespaced_pod_log(self, name: str, namespace: str, **asked: Any) -> Any:
        assert asked["timestamps"]
        lines = list(self.client.get_job_logs(name))
        stamps = self.stamps.setdefault(name, [])
        while len(stamps) < len(lines):
            stamps.append(f"2026-01-01T00:00:00.{next(self.clock):09d}Z")
        stamped = [f"{stamp} {line}" for stamp, line in zip(stamps, lines, strict=False)]
        return SimpleNamespace(data="\n".join(stamped).encode())


def processes(node: str) -> list[psutil.Process]:
    """The node's process that runs the trainer's function: what a container's first process is."""
    result = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # It may end while it is looked at.
            if any(word.endswith(f"train_{node}.py") for word in process.cmdline()):
                result.append(process)
    return result


if __name__ == "__main__":
    from cappy.training.remote import kubeflow, run
    from cappy.worker import launch

    step, settings, source, target = sys.argv[1:]
    setattr(kubeflow, "connect", lambda plan: LocalTrainJobs())  # noqa: B010 # it has what is used of the client
    run.POLL_SECONDS = 0.5
    launch(step, settings, fingerprint="f", source=source, target=target)
