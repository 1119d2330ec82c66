"""A server that speaks as much of Kubernetes' REST API as the Trainer SDK asks for, and notes what was asked.

It checks nothing and runs nothing: it proves what the SDK sends, not what a cluster makes of it.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from local_server import handled_by

BORN = "2026-01-01T00:00:00Z"
VERBS = {"POST": "create", "DELETE": "delete", "PATCH": "patch", "PUT": "update"}


class Request(NamedTuple):
    """A request in the words of RBAC."""

    verb: str
    group: str
    resource: str
    namespace: str
    name: str = ""


@dataclass
class Cluster:
    """Runtimes by name, the TrainJobs that were created, and every request."""

    runtimes: dict[str, Any]
    pod: dict[str, Any]
    address: str = ""
    jobs: dict[str, Any] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)

    def answer(self, method: str, path: str, body: Any) -> Any:
        """The answer to a request; None if the object does not exist."""
        parts = urlsplit(path)
        asked = [part for part in parts.path.split("/") if part]
        group, rest = ("", asked[2:]) if asked[0] == "api" else (asked[1], asked[3:])
        namespace = rest[1] if rest[0] == "namespaces" else ""
        resource, *name = rest[2:] if namespace else rest
        kind = "/".join((resource, *name[1:]))
        watched = "watch" in parse_qs(parts.query)
        verb = VERBS.get(method) or ("watch" if watched else "get" if name else "list")
        self.requests.append(Request(verb, group, kind, namespace, name[0] if name else ""))
        return self._answer_for(verb, kind, name[0] if name else "", namespace, body)

    def _answer_for(self, verb: str, kind: str, name: str, namespace: str, body: Any) -> Any:
        if kind == "trainjobs" and verb == "create":
            metadata = {**body["metadata"], "namespace": namespace, "creationTimestamp": BORN}
            self.jobs[body["metadata"]["name"]] = {**body, "metadata": metadata}
            return self.jobs[body["metadata"]["name"]]
        if kind == "trainjobs" and verb == "delete":
            return self.jobs.pop(name, None)
        if kind == "trainjobs":
            return {"items": list(self.jobs.values())} if verb == "list" else self.jobs.get(name)
        if kind == "trainingruntimes":
            return {"items": list(self.runtimes.values())} if verb == "list" else self.runtimes.get(name)
        if kind == "clustertrainingruntimes":
            return {"items": []} if verb == "list" else None
        if kind == "pods":
            return {"kind": "PodList", "apiVersion": "v1", "items": [self.pod]}
        if kind == "events":
            return {"kind": "EventList", "apiVersion": "v1", "items": []}
        return "one line\nanother\n" if kind == "pods/log" else None


@contextmanager
def cluster(runtimes: list[dict[str, Any]], pod_spec: dict[str, Any]) -> Iterator[Cluster]:
    """A cluster in which each TrainJob has one running pod, while the block lasts."""
    labels = {"jobset.sigs.k8s.io/replicatedjob-name": "node", "batch.kubernetes.io/job-completion-index": "0"}
    pod = {
        "metadata": {"name": "job-node-0-0", "labels": labels, "creationTimestamp": BORN},
        "spec": pod_spec,
        "status": {"phase": "Running"},
    }
    state = Cluster({one["metadata"]["name"]: one for one in runtimes}, pod)

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            length = int(self.headers.get("content-length", 0))
            body = json.loads(self.rfile.read(length)) if length else None
            result = state.answer(self.command, self.path, body)
            status = 200 if result is not None else 404
            content = {"kind": "Status", "code": 404} if result is None else result
            data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-type", "text/plain" if isinstance(content, str) else "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = do_PATCH = do_PUT = _handle  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with handled_by(Handler) as address:
        state.address = address
        yield state
