"""A small server that speaks the REST of Kubeflow Pipelines and, for pods and their logs, of Kubernetes.

It parses every request strictly into the client's own types and the pipeline into kfp's own message. It proves what is
asked for, not that a cluster would grant it.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import kfp_server_api
from google.protobuf.json_format import ParseDict
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2
from local_server import handled_by

API = "/apis/v2beta1"


@dataclass
class Kubeflow:
    """What the server received, and the runs, pods and logs that it serves."""

    experiments: list[dict[str, Any]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    pods: list[dict[str, Any]] = field(default_factory=list)
    logs: dict[str, str] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    address: str = ""
    shared: bool = False
    refuse: tuple[int, str] | None = None

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> Any:
        """What a request gets; a text for a log."""
        if self.refuse is not None and path.startswith(API):
            raise Refusal(*self.refuse)
        if path.startswith("/api/v1/namespaces/"):
            return self.cluster(path, query)
        if path == f"{API}/healthz":
            return {"multi_user": self.shared}
        if path == f"{API}/experiments":
            return self.experiment(method, query, body)
        if path == f"{API}/runs" and method == "POST":
            return self.start(body)
        result = re.fullmatch(rf"{API}/runs/([^/:]+)(:terminate)?", path)
        if result and result[2]:
            self.ended.append(result[1])
            return {}
        if result and result[1] == "run-1" and self.runs:
            # Each look takes the next state, and the last one stays.
            state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
            return {"run_id": "run-1", "experiment_id": "e-1", **state}
        raise Refusal(404, f"{path} not found")

    def experiment(self, method: str, query: dict[str, list[str]], body: Any) -> Any:
        """Lists or makes an experiment."""
        if method == "GET":
            return {"experiments": self.experiments}
        strict("V2beta1Experiment", body)
        if bool(body.get("namespace")) != self.shared:
            raise Refusal(400, "a namespace is for a server that users share")
        made = {**body, "experiment_id": "e-1"}
        self.experiments.append(made)
        return made

    def start(self, body: Any) -> Any:
        """Takes a run whose pipeline is one, with arguments that it knows."""
        strict("V2beta1Run", body)
        spec = body["pipeline_spec"]
        pipeline = spec.get("pipeline_spec", spec)
        ParseDict(pipeline, pipeline_spec_pb2.PipelineSpec(), ignore_unknown_fields=False)
        for executor in (
            spec.get("platform_spec", {})
            .get("platforms", {})
            .get("kubernetes", {})
            .get("deploymentSpec", {})
            .get("executors", {})
            .values()
        ):
            config = kubernetes_executor_config_pb2.KubernetesExecutorConfig()
            ParseDict(executor, config, ignore_unknown_fields=False)
        known = pipeline["root"]["inputDefinitions"]["parameters"]
        if unknown := set(body["runtime_config"]["parameters"]) - set(known):
            raise Refusal(400, f"unknown parameters {unknown}")
        self.runs.append(body)
        return {"run_id": "run-1", **body}

    def cluster(self, path: str, query: dict[str, list[str]]) -> Any:
        """Pods by label, and the log of one."""
        if path.endswith("/pods"):
            assert query["labelSelector"] == ["pipeline/runid=run-1"]
            return {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": self.pods}
        name = path.split("/")[-2]
        assert query["container"] == ["main"]
        if name not in self.logs:
            raise Refusal(400, f"container main in pod {name} is waiting to start")
        return self.logs[name]

    def kubeconfig(self, folder: Path) -> Path:
        """A configuration of kubectl that leads here."""
        path = folder / "kubeconfig"
        values = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": "here", "cluster": {"server": self.address}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
            "users": [{"name": "me", "user": {"token": "a token"}}],
        }
        path.write_text(json.dumps(values))
        return path


class Refusal(Exception):  # noqa: N818
    """A status and the service's words."""


def strict(kind: str, body: Any) -> None:
    """Refuses keys that the client's own type does not have, at every depth."""
    model = getattr(kfp_server_api, kind, None)
    if model is None:
        return
    kinds = {json_name: model.openapi_types[name] for name, json_name in model.attribute_map.items()}
    if unknown := set(body) - set(kinds):
        raise Refusal(400, f"{kind} has no {unknown}")
    for name, value in body.items():
        strict(kinds[name], value)


def pod(name: str, step: str, waiting: str = "") -> dict[str, Any]:
    """A pod as Argo names it, its container waiting for a reason or running."""
    state = {"waiting": {"reason": waiting, "message": "no such image"}} if waiting else {"running": {}}
    status = {"name": "main", "state": state, "image": "i", "imageID": "", "ready": False, "restartCount": 0}
    annotations = {"workflows.argoproj.io/node-name": f"cappy-adapt-x.root.exit-handler-1.{step}.executor"}
    return {"metadata": {"name": name, "annotations": annotations}, "status": {"containerStatuses": [status]}}


@contextmanager
def kubeflow_server() -> Iterator[Kubeflow]:
    """The server, for the block."""
    kubeflow = Kubeflow()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply("GET")

        def do_POST(self) -> None:
            self.reply("POST")

        def reply(self, method: str) -> None:
            parts = urlsplit(self.path)
            data = self.rfile.read(int(self.headers.get("content-length", 0)))
            path = unquote(parts.path)
            kubeflow.calls.append(f"{method} {path}")
            kubeflow.headers.append(dict(self.headers))
            try:
                status = 200
                answer = kubeflow.answer(method, path, parse_qs(parts.query), json.loads(data) if data else {})
            except Refusal as refusal:
                status, words = refusal.args
                answer = {"error": words, "code": status, "message": words}
            payload = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            self.send_header("content-type", "text/plain" if isinstance(answer, str) else "application/json")
            self.send_header("content-length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with handled_by(Handler) as address:
        kubeflow.address = address
        yield kubeflow
