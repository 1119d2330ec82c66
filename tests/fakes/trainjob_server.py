"""A small server that speaks what the Trainer SDK asks of a Kubernetes API server: TrainJobs, runtimes, pods, logs.

It takes a TrainJob only if the SDK's own type knows every field of it, at every depth (the type drops others silently,
so what it reads must be what came). It runs nothing: a test says how the pods are.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob
from local_server import handled_by

API = "/apis/trainer.kubeflow.org/v1alpha1"
MADE = "2026-01-01T00:00:00Z"
NODE = {
    "name": "node",
    "template": {
        "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
        "spec": {"template": {"spec": {"containers": [{"name": "node", "image": "torch:1"}]}}},
    },
}
RUNTIME = {
    "apiVersion": "trainer.kubeflow.org/v1alpha1",
    "kind": "ClusterTrainingRuntime",
    "metadata": {"name": "cappy-torch", "labels": {"trainer.kubeflow.org/framework": "torch"}},
    "spec": {
        "mlPolicy": {"numNodes": 1, "torch": {"numProcPerNode": "auto"}},
        "template": {"spec": {"replicatedJobs": [NODE]}},
    },
}


@dataclass
class Cluster:
    """TrainJobs by name, pods, their logs as (time, line), and every call; `refuse`: status and words by call."""

    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    pods: list[dict[str, Any]] = field(default_factory=list)
    logs: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    queries: list[dict[str, list[str]]] = field(default_factory=list)
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)
    address: str = ""

    def pod(
        self, job: str, index: int, phase: str, attempt: str = "a", at: str = MADE, **status: Any
    ) -> dict[str, Any]:
        """Adds a pod of a TrainJob's node, made at this time; another attempt is another pod."""
        labels = {
            "jobset.sigs.k8s.io/jobset-name": job,
            "jobset.sigs.k8s.io/replicatedjob-name": "node",
            "batch.kubernetes.io/job-completion-index": str(index),
        }
        name = f"{job}-node-0-{index}-{attempt}"
        made = {
            "metadata": {"name": name, "labels": labels, "creationTimestamp": at},
            "spec": {"containers": [{"name": "node", "image": "torch:1"}]},
            "status": {"phase": phase, **status},
        }
        self.pods = [one for one in self.pods if one["metadata"]["name"] != name] + [made]
        return made

    def end(self, job: str, condition: str) -> None:
        """The TrainJob's controller says that it is over."""
        made = {"type": condition, "status": "True", "reason": "x", "message": "m", "lastTransitionTime": MADE}
        self.jobs[job]["status"] = {"conditions": [made]}

    def answer(self, verb: str, path: str, query: dict[str, list[str]], data: bytes) -> tuple[int, Any]:
        """Status and body."""
        kind, _, name = path.removeprefix(API).removeprefix("/api/v1").removeprefix("/namespaces/ml/").partition("/")
        if refusal := self.refuse.get(f"{verb} {kind}"):
            return refusal[0], {"message": refusal[1]}
        if "clustertrainingruntimes" in path:
            return (200, RUNTIME) if path.endswith("/cappy-torch") else (404, {"message": "no such runtime"})
        if kind == "trainjobs":
            return self.trainjob(verb, name, json.loads(data) if data and verb == "POST" else {})
        if kind == "pods" and name.endswith("/log"):
            assert query["timestamps"] == ["True"]
            self.queries.append(query)
            return 200, "".join(f"{stamp} {line}\n" for stamp, line in self.logs.get(name.removesuffix("/log"), []))
        if kind == "pods":
            job = query["labelSelector"][0].partition("=")[2].partition(",")[0]
            wanted = [one for one in self.pods if one["metadata"]["labels"]["jobset.sigs.k8s.io/jobset-name"] == job]
            # By name, as a cluster's store keeps them: not by when they were made.
            return 200, {"kind": "PodList", "items": sorted(wanted, key=lambda one: str(one["metadata"]["name"]))}
        return 404, {"message": f"{path} not found"}

    def trainjob(self, verb: str, name: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Creates, reads or deletes one."""
        if verb == "POST":
            read = TrainerV1alpha1TrainJob.from_dict(body).to_dict()
            if read != body:
                return 422, {"message": f"unknown fields: {body} is read as {read}"}
            made = body["metadata"]["name"]
            if made in self.jobs:
                return 409, {"message": f"{made} already exists"}
            self.jobs[made] = {**body, "metadata": {**body["metadata"], "namespace": "ml", "creationTimestamp": MADE}}
            return 201, self.jobs[made]
        if name not in self.jobs:
            return 404, {"message": f"{name} not found"}
        if verb == "DELETE":
            self.pods = [one for one in self.pods if not one["metadata"]["name"].startswith(name)]
            return 200, self.jobs.pop(name)
        return 200, self.jobs[name]


@contextmanager
def trainjob_server() -> Iterator[Cluster]:
    """The server, for the block."""
    cluster = Cluster()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply("GET")

        def do_POST(self) -> None:
            self.reply("POST")

        def do_DELETE(self) -> None:
            self.reply("DELETE")

        def reply(self, verb: str) -> None:
            parts = urlsplit(self.path)
            data = self.rfile.read(int(self.headers.get("content-length", 0)))
            cluster.calls.append(f"{verb} {parts.path}")
            status, answer = cluster.answer(verb, parts.path, parse_qs(parts.query), data)
            payload = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "text/plain" if isinstance(answer, str) else "application/json")
            self.send_header("content-length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with handled_by(Handler) as address:
        cluster.address = address
        yield cluster
