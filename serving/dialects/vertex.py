"""Vertex AI's prediction requests and KServe's version 1, which have the same shape: instances in, predictions out."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Field, JsonValue

from cappy.scoring.encoding import Pair
from serving.dialects.dialect import Body, Dialect, ErrorResponse, NonEmptyText, ScoredPairs, ServedModels
from serving.engine import Models

EXAMPLE: dict[str, JsonValue] = {"instances": [{"instruction": "What is 1 + 1?", "response": "2"}]}


class Instance(Body):
    """An instruction and a response to it."""

    instruction: NonEmptyText
    response: str


class NoParameters(Body):
    """An empty object: scoring has no parameters."""


class InstancesRequest(Body):
    """Pairs, as objects or as lists of two."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    instances: Annotated[list[Instance | tuple[NonEmptyText, str]], Field(min_length=1, fail_fast=True)]
    parameters: NoParameters | None = None


class Prediction(Body):
    """A pair's score, and its expected label, 0 to 1, if the scorer is calibrated."""

    score: float
    expected: float | None = None


class PredictionsResponse(Body):
    """Predictions in the order of the instances."""

    predictions: Sequence[Prediction]


class PlatformErrorResponse(ErrorResponse):
    """An error."""

    error: str


UNKNOWN_MODEL_RESPONSES: dict[int | str, dict[str, object]] = {404: {"model": PlatformErrorResponse}}
UNREADY_RESPONSES: dict[int | str, dict[str, object]] = {503: {"description": "The service is not ready"}}


def error_body(status: int, message: str) -> Mapping[str, object]:
    """The body of an error of Vertex AI and KServe."""
    return {"error": message}


def _pairs(request: InstancesRequest) -> list[Pair]:
    return [
        (instance.instruction, instance.response) if isinstance(instance, Instance) else instance
        for instance in request.instances
    ]


def _answer(request: InstancesRequest, result: ScoredPairs) -> PredictionsResponse:
    expected: Sequence[float | None] = result.expected or [None] * len(result.scores)
    return PredictionsResponse(
        predictions=[
            Prediction(score=score, expected=label) for score, label in zip(result.scores, expected, strict=True)
        ]
    )


VERTEX = Dialect(
    name="vertex",
    paths=("/predict",),
    request=InstancesRequest,
    response=PredictionsResponse,
    error_response=PlatformErrorResponse,
    pairs=_pairs,
    answer=_answer,
    error_body=error_body,
    example_body='{"instances": [{"instruction": "...", "response": "..."}, ...]}',
    marker_fields=frozenset({"instances"}),
    invalid_status=400,
    exclude_none=True,
)


def unknown_model(models: Models, model: str, version: str = "") -> Response | None:
    """A 404 response for a model or a version that is not served; None if it is served."""
    current = models.current
    names = (current.name, current.version, current.spec)
    if model in names and version in ("", *names):
        return None
    return JSONResponse({"error": f"no model or version of this name is served; use {current.name}"}, status_code=404)


def model_state(models: Models, model: str, version: str = "") -> Response:
    """Readiness of a model."""
    content = {"name": model, "ready": not models.unready_reason}
    status = 503 if models.unready_reason else 200
    return unknown_model(models, model, version) or JSONResponse(content, status_code=status)


def _add_routes(app: FastAPI, served_models: ServedModels) -> None:
    @app.get("/v1/models", tags=["served"])
    async def list_models() -> Mapping[str, object]:
        """The served model, for clients of KServe and vLLM."""
        name = served_models.models.current.name
        return {"models": [name], "object": "list", "data": [{"id": name, "object": "model", "owned_by": "cappy"}]}

    @app.get("/v1/models/{model}", tags=["served"], responses={**UNKNOWN_MODEL_RESPONSES, **UNREADY_RESPONSES})
    async def model_status(model: str) -> Response:
        """Readiness of a model."""
        return model_state(served_models.models, model)


KSERVE = replace(VERTEX, name="kserve", paths=("/v1/models/{model}:predict",), add_routes=_add_routes)
