"""What is served, as each kind of client asks for it: names, versions, shapes and whether scores can be had."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse, PlainTextResponse

import cappy
from serving.dialects.open_inference import DATATYPE, INPUTS, OUTPUT
from serving.dialects.tei import LABEL
from serving.dialects.vertex import PlatformProblem
from serving.models import Models
from serving.service import Limits

UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"model": PlatformProblem}}
UNREADY: dict[int | str, dict[str, Any]] = {503: {"description": "Scores cannot be had"}}


def add_served(app: FastAPI, models: Models, limits: Limits, batch_tokens: int) -> None:
    """The GET routes of KServe, Open Inference, MLflow and Text Embeddings Inference; they need no key."""
    _add_kserve(app, models)
    _add_open_inference(app, models)
    _add_mlflow(app, models)

    @app.get("/info", tags=["served"])
    async def info() -> Mapping[str, Any]:
        """What Text Embeddings Inference tells of a model, as far as it holds here."""
        model = models.current
        return {
            "model_id": model.name,
            "model_sha": model.sha256,
            "model_dtype": model.precision,
            "model_type": {"reranker": {"id2label": {"0": LABEL}, "label2id": {LABEL: 0}}},
            "max_batch_tokens": batch_tokens,
            "max_client_batch_size": limits.max_pairs,
            "auto_truncate": True,
            "version": cappy.__version__,
        }


def _add_kserve(app: FastAPI, models: Models) -> None:
    @app.get("/v1/models", tags=["served"])
    async def list_models() -> Mapping[str, Any]:
        """The model that is served, for KServe's clients and for vLLM's."""
        name = models.current.name
        return {"models": [name], "object": "list", "data": [{"id": name, "object": "model", "owned_by": "cappy"}]}

    @app.get("/v1/models/{model}", tags=["served"], responses={**UNKNOWN, **UNREADY})
    async def model_status(model: str) -> Response:
        """Whether a model can score."""
        return _state(models, model)


def _add_open_inference(app: FastAPI, models: Models) -> None:
    @app.get("/v2", tags=["served"])
    async def server_metadata() -> Mapping[str, Any]:
        """The service itself."""
        return {"name": "cappy", "version": cappy.__version__, "extensions": ["binary_tensor_data"]}

    @app.get("/v2/health/live", tags=["served"])
    async def server_live() -> Mapping[str, bool]:
        """Whether the process lives."""
        return {"live": True}

    @app.get("/v2/health/ready", tags=["served"], responses=UNREADY)
    async def server_ready() -> Response:
        """Whether scores can be had."""
        return JSONResponse({"ready": not models.unready}, status_code=503 if models.unready else 200)

    async def model_metadata(model: str, version: str = "") -> Response:
        """Names and types of the tensors."""
        return _unknown(models, model, version) or JSONResponse(
            {
                "name": model,
                "versions": [models.current.version],
                "platform": "cappy",
                "inputs": [_tensor(name, "BYTES") for name in INPUTS],
                "outputs": [_tensor(OUTPUT, DATATYPE)],
            }
        )

    async def model_ready(model: str, version: str = "") -> Response:
        """Whether a model can score."""
        return _state(models, model, version)

    for place in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        app.get(place, tags=["served"], responses=UNKNOWN)(model_metadata)
        app.get(f"{place}/ready", tags=["served"], responses={**UNKNOWN, **UNREADY})(model_ready)


def _add_mlflow(app: FastAPI, models: Models) -> None:
    @app.get("/ping", tags=["served"], response_class=PlainTextResponse, responses=UNREADY)
    async def ping() -> Response:
        """Whether scores can be had."""
        return PlainTextResponse("\n", status_code=503 if models.unready else 200)

    @app.get("/version", tags=["served"], response_class=PlainTextResponse)
    async def version() -> Response:
        """The version of this service."""
        return PlainTextResponse(cappy.__version__)


def _tensor(name: str, datatype: str) -> Mapping[str, Any]:
    shape: Sequence[int] = [-1]
    return {"name": name, "datatype": datatype, "shape": shape}


def _unknown(models: Models, model: str, version: str = "") -> Response | None:
    """The refusal of a model or a version that is not served."""
    current = models.current
    names = (current.name, current.version, current.spec)
    if model in names and version in ("", *names):
        return None
    return JSONResponse({"error": f"no model of that name is served; ask for {current.name}"}, status_code=404)


def _state(models: Models, model: str, version: str = "") -> Response:
    status = 503 if models.unready else 200
    return _unknown(models, model, version) or JSONResponse(
        {"name": model, "ready": not models.unready}, status_code=status
    )
