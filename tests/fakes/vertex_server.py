"""A small server that speaks the REST of Vertex AI's models, endpoints, custom and pipeline jobs, bucket and logs.

It parses every request strictly into the SDK's own message, so that a field which the service does not know is an
error, and answers long-running operations at once. It proves what is asked for, not that Google would grant it.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from google.cloud.aiplatform_v1 import types
from google.protobuf.json_format import ParseDict, ParseError
from local_server import handled_by

V1 = "type.googleapis.com/google.cloud.aiplatform.v1"


@dataclass
class Vertex:
    """What the server received: uploaded models, endpoints, custom jobs, objects of the bucket, and every call."""

    models: list[dict[str, Any]] = field(default_factory=list)
    endpoints: list[dict[str, Any]] = field(default_factory=list)
    custom_jobs: list[dict[str, Any]] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    entries: list[dict[str, Any]] = field(default_factory=list)
    unreadable: bool = False
    address: str = ""
    refuse: tuple[int, str] | None = None

    def upload(self, parent: str, body: dict[str, Any]) -> dict[str, Any]:
        """models:upload: a new model, or a new version of one."""
        strict(types.UploadModelRequest, body)
        model = dict(body["model"])
        name = body.get("parentModel") or f"{parent}/models/{1000 + len(self.models)}"
        version = str(1 + sum(one["name"] == name for one in self.models))
        model |= {"name": name, "versionId": version, "supportedDeploymentResourcesTypes": ["DEDICATED_RESOURCES"]}
        # What a version of a model without an alias cannot be listed by.
        model["versionAliases"] = ["default"] if version == "1" else []
        self.models.append(model)
        return done("UploadModelResponse", {"model": name, "modelVersionId": version})

    def create(self, parent: str, body: dict[str, Any]) -> dict[str, Any]:
        """endpoints: an empty one."""
        strict(types.Endpoint, body)
        made = {**body, "name": f"{parent}/endpoints/{2000 + len(self.endpoints)}", "trafficSplit": {}}
        self.endpoints.append(made)
        return done("Endpoint", made)

    def deploy(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """endpoints:deployModel: the shares must sum to 100 and name what is deployed."""
        strict(types.DeployModelRequest, body)
        endpoint = self.find(self.endpoints, name)
        added = dict(body["deployedModel"])
        bare, _, version = added["model"].partition("@")
        own = [one for one in self.models if one["name"] == bare]
        added |= {"id": str(3000 + len(self.calls)), "model": bare, "modelVersionId": version or own[-1]["versionId"]}
        shares = {added["id"] if key == "0" else key: value for key, value in body.get("trafficSplit", {}).items()}
        known = {one["id"] for one in endpoint.get("deployedModels", [])} | {added["id"]}
        if sum(shares.values()) != 100 or not set(shares) <= known:
            raise Refusal(400, f"traffic {shares} must sum to 100 over {known}")
        endpoint.setdefault("deployedModels", []).append(added)
        endpoint["trafficSplit"] = shares
        return done("DeployModelResponse", {"deployedModel": added})

    def start(self, parent: str, body: dict[str, Any]) -> dict[str, Any]:
        """customJobs: a job that waits; a test says how it goes on."""
        strict(types.CustomJob, body)
        number = 4000 + len(self.custom_jobs)
        made = f"2026-01-01T00:00:{len(self.custom_jobs):02d}Z"
        self.custom_jobs.append(
            {**body, "name": f"{parent}/customJobs/{number}", "state": "JOB_STATE_PENDING", "createTime": made}
        )
        return self.custom_jobs[-1]

    def cancel(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """customJobs:cancel: its containers get SIGTERM."""
        strict(types.CancelCustomJobRequest, body)
        self.find(self.custom_jobs, name)["state"] = "JOB_STATE_CANCELLED"
        return {}

    def undeploy(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """endpoints:undeployModel: not while it has traffic."""
        strict(types.UndeployModelRequest, body)
        endpoint, gone = self.find(self.endpoints, name), body["deployedModelId"]
        if endpoint["trafficSplit"].get(gone):
            raise Refusal(400, f"{gone} has traffic")
        endpoint["deployedModels"] = [one for one in endpoint["deployedModels"] if one["id"] != gone]
        endpoint["trafficSplit"].pop(gone, None)
        return done("UndeployModelResponse", {})

    def update(self, name: str, body: dict[str, Any], mask: str) -> dict[str, Any]:
        """PATCH of an endpoint: its traffic."""
        strict(types.Endpoint, body)
        endpoint = self.find(self.endpoints, name)
        known = {one["id"] for one in endpoint["deployedModels"]}
        if (
            mask.replace("_", "").casefold() != "trafficsplit"
            or not set(body["trafficSplit"]) <= known
            or sum(body["trafficSplit"].values()) != 100
        ):
            raise Refusal(400, f"cannot set {mask} to {body}")
        endpoint["trafficSplit"] = body["trafficSplit"]
        return endpoint

    def job(self, method: str, resource: str, verb: str, query: dict[str, list[str]], body: Any) -> dict[str, Any]:
        """pipelineJobs: one is created under the id that it asks for, looked at, cancelled."""
        if method == "POST" and not verb:
            from kfp.pipeline_spec import pipeline_spec_pb2  # Beside another SDK there is no kfp.

            strict(types.PipelineJob, body)
            PipelineSpec = pipeline_spec_pb2.PipelineSpec  # noqa: N806
            ParseDict(body["pipelineSpec"], PipelineSpec(), ignore_unknown_fields=False)
            name = f"{resource}/{query['pipelineJobId'][0]}"
            self.jobs[name] = {**body, "name": name, "state": "PIPELINE_STATE_PENDING"}
            return self.jobs[name]
        if resource not in self.jobs:
            raise Refusal(404, f"{resource} not found")
        return {} if verb == "cancel" else self.jobs[resource]

    def logged(self, body: Any) -> dict[str, Any]:
        """entries:list of Cloud Logging, a page of one at a time, in the order that is asked for (oldest first)."""
        if self.unreadable:
            raise Refusal(403, "Permission denied for all log views")
        number = int(body.get("pageToken", 0))
        more = {"nextPageToken": str(number + 1)} if number + 1 < len(self.entries) else {}
        entries = self.entries if body.get("orderBy", "timestamp asc") == "timestamp asc" else self.entries[::-1]
        return {"entries": entries[number : number + 1], **more}

    @staticmethod
    def find(among: list[dict[str, Any]], name: str) -> dict[str, Any]:
        bare, _, version = name.partition("@")
        result = [one for one in among if one["name"] == bare and (not version or one.get("versionId") == version)]
        if not result:
            raise Refusal(404, f"{name} not found")
        return result[-1]

    def answer(self, method: str, path: str, query: dict[str, list[str]], data: bytes) -> dict[str, Any]:
        """What a request gets."""
        if self.refuse is not None and path.startswith("/v1/"):
            raise Refusal(*self.refuse)
        if "/storage/" in path or "/upload/" in path:
            return self.store(method, path, query, data)
        body = json.loads(data) if data else {}
        resource, _, verb = path.removeprefix("/v1/").partition(":")
        if path == "/v2/entries:list":
            return self.logged(body)
        if "/pipelineJobs" in resource:
            return self.job(method, resource, verb, query, body)
        if verb == "listVersions":
            return {"models": [one for one in self.models if one["name"] == resource]}
        verbs = {
            "upload": self.upload,
            "deployModel": self.deploy,
            "undeployModel": self.undeploy,
            "cancel": self.cancel,
        }
        if verb in verbs:
            return verbs[verb](resource.removesuffix("/models"), body)
        if method == "PATCH":
            return self.update(resource, body, query["updateMask"][0])
        if resource.endswith(("/models", "/endpoints", "/customJobs")):
            kind = resource.rsplit("/", 1)[1]
            if kind == "customJobs" and method == "POST":
                return self.start(resource.removesuffix("/customJobs"), body)
            if method == "POST":
                return self.create(resource.removesuffix("/endpoints"), body)
            among = {"models": latest(self.models), "endpoints": self.endpoints, "customJobs": self.custom_jobs}[kind]
            return {kind: [one for one in among if matches(one, query.get("filter", [""])[0])]}
        kinds = {"endpoints": self.endpoints, "models": self.models, "customJobs": self.custom_jobs}
        return self.find(kinds[resource.rsplit("/", 2)[1]], resource)

    def store(self, method: str, path: str, query: dict[str, list[str]], data: bytes) -> dict[str, Any]:
        """The bucket: an object in one multipart request."""
        if method == "POST" and query.get("uploadType") == ["multipart"]:
            boundary = data.split(b"\r\n", 1)[0]
            _, described, content = data.split(boundary + b"\r\n")[0:3]
            name = json.loads(described.split(b"\r\n\r\n", 1)[1])["name"]
            self.objects[name] = content.split(b"\r\n\r\n", 1)[1].rsplit(b"\r\n" + boundary, 1)[0]
            return {"name": name, "bucket": "bucket", "size": str(len(self.objects[name]))}
        return {"name": "bucket", "location": "US-CENTRAL1", "projectNumber": "1"}


class Refusal(Exception):  # noqa: N818
    """A status and the service's words."""


def strict(kind: Any, body: dict[str, Any]) -> None:
    """Refuses what is not exactly the SDK's message."""
    try:
        ParseDict(body, kind.pb(kind()), ignore_unknown_fields=False)
    except ParseError as error:
        raise Refusal(400, str(error)) from error


def done(kind: str, response: dict[str, Any]) -> dict[str, Any]:
    """A long-running operation that is over."""
    return {"name": "projects/1/operations/1", "done": True, "response": {"@type": f"{V1}.{kind}", **response}}


def latest(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A list has each model once, its newest version."""
    return list({one["name"]: one for one in models}.values())


def matches(one: dict[str, Any], wanted: str) -> bool:
    """The few filters that are used here."""
    terms = re.findall(r'(?:labels\.([\w-]+)|(display_name))="([^"]*)"', wanted)
    return all((one.get("labels", {}).get(label) if label else one["displayName"]) == text for label, _, text in terms)


@contextmanager
def vertex_server() -> Iterator[Vertex]:
    """The server, for the block."""
    vertex = Vertex()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply("GET")

        def do_POST(self) -> None:
            self.reply("POST")

        def do_PATCH(self) -> None:
            self.reply("PATCH")

        def reply(self, method: str) -> None:
            parts = urlsplit(self.path)
            data = self.rfile.read(int(self.headers.get("content-length", 0)))
            vertex.calls.append(f"{method} {unquote(parts.path)}")
            try:
                status, answer = 200, vertex.answer(method, unquote(parts.path), parse_qs(parts.query), data)
            except Refusal as refusal:
                code, words = refusal.args
                status, answer = code, {"error": {"code": code, "message": words, "status": "FAILED_PRECONDITION"}}
            payload = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with handled_by(Handler) as address:
        vertex.address = address
        yield vertex
