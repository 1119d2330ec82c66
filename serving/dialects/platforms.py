"""The prediction requests of platforms: Vertex AI, KServe (version 1) and MLflow's scoring server.

Vertex AI and KServe have the same shape: instances in, predictions out. MLflow's POST /invocations has a table of
instructions and responses in one of four formats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Self

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

import cappy
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

COLUMNS = ("instruction", "response")
FORMATS = ("dataframe_split", "dataframe_records", "instances", "inputs")
ERROR_CODES: Mapping[int, str] = {
    401: "UNAUTHENTICATED",
    404: "RESOURCE_DOES_NOT_EXIST",
    429: "REQUEST_LIMIT_EXCEEDED",
    500: "INTERNAL_ERROR",
    503: "TEMPORARILY_UNAVAILABLE",
    504: "TEMPORARILY_UNAVAILABLE",
}
MLFLOW_EXAMPLE: dict[str, JsonValue] = {"dataframe_split": {"columns": [*COLUMNS], "data": [["What is 1 + 1?", "2"]]}}


class InputRow(BaseModel):
    """An instruction and a response; other columns are ignored."""

    instruction: NonEmptyText
    response: str


class Columns(BaseModel):
    """Instructions and responses, one per row; other columns are ignored."""

    instruction: Annotated[list[NonEmptyText], Field(min_length=1, fail_fast=True)]
    response: Annotated[list[str], Field(min_length=1, fail_fast=True)]

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if len(self.instruction) != len(self.response):
            raise ValueError(f"{len(self.instruction)} instructions for {len(self.response)} responses")
        return self


class Split(BaseModel):
    """Column names, and rows with one value per column."""

    columns: Annotated[list[str], Field(fail_fast=True)]
    data: Annotated[list[list[JsonValue]], Field(min_length=1, fail_fast=True)]

    @model_validator(mode="after")
    def _check_cells(self) -> Self:
        self.pairs()
        return self

    def pairs(self) -> list[Pair]:
        """The pairs in the two columns; raises ValueError for a missing column or an invalid row."""
        if missing := set(COLUMNS) - set(self.columns):
            raise ValueError(f"there is no column {min(missing)}")
        if any(len(row) != len(self.columns) for row in self.data):
            raise ValueError(f"every row must have {len(self.columns)} values, one per column")
        instruction_index, response_index = map(self.columns.index, COLUMNS)
        return [_row_pair(index, row[instruction_index], row[response_index]) for index, row in enumerate(self.data)]


def _row_pair(row: int, instruction: JsonValue, response: JsonValue) -> Pair:
    if not isinstance(instruction, str) or not isinstance(response, str):
        raise ValueError(f"row {row} must have strings in the columns {' and '.join(COLUMNS)}")
    if not instruction:
        raise ValueError(f"row {row} has an empty instruction")
    return instruction, response


Rows = Annotated[list[InputRow], Field(min_length=1, fail_fast=True)]


class InvocationsRequest(Body):
    """A table in one of the four formats."""

    model_config = ConfigDict(json_schema_extra={"examples": [MLFLOW_EXAMPLE]})

    dataframe_split: Split | None = None
    dataframe_records: Rows | None = None
    instances: Rows | Columns | None = None
    inputs: Rows | Columns | None = None
    params: NoParameters | None = None

    @model_validator(mode="after")
    def _check_format(self) -> Self:
        if sum(getattr(self, name) is not None for name in FORMATS) != 1:
            raise ValueError(f"there must be exactly one of {', '.join(FORMATS)}")
        return self


class InvocationsResponse(Body):
    """Scores in the order of the rows."""

    predictions: Sequence[float]


class MlflowErrorResponse(ErrorResponse):
    """An error."""

    error_code: str
    message: str


def _table_pairs(request: InvocationsRequest) -> list[Pair]:
    table = next(table for name in FORMATS if (table := getattr(request, name)) is not None)
    if isinstance(table, Split):
        return table.pairs()
    if isinstance(table, Columns):
        return list(zip(table.instruction, table.response, strict=True))
    return [(row.instruction, row.response) for row in table]


def _mlflow_error_body(status: int, message: str) -> Mapping[str, object]:
    return {"error_code": ERROR_CODES.get(status, "BAD_REQUEST"), "message": message}


def _add_mlflow_routes(app: FastAPI, served_models: ServedModels) -> None:
    @app.get("/ping", tags=["served"], response_class=PlainTextResponse, responses=UNREADY_RESPONSES)
    async def ping() -> Response:
        """Readiness of the service."""
        return PlainTextResponse("\n", status_code=503 if served_models.models.unready_reason else 200)

    @app.get("/version", tags=["served"], response_class=PlainTextResponse)
    async def version() -> Response:
        """The version of this service."""
        return PlainTextResponse(cappy.__version__)


MLFLOW = Dialect(
    name="mlflow",
    paths=("/invocations",),
    request=InvocationsRequest,
    response=InvocationsResponse,
    error_response=MlflowErrorResponse,
    pairs=_table_pairs,
    answer=lambda request, result: InvocationsResponse(predictions=result.scores),
    error_body=_mlflow_error_body,
    example_body='{"dataframe_split": {"columns": ["instruction", "response"], "data": [["...", "..."], ...]}}',
    invalid_status=400,
    add_routes=_add_mlflow_routes,
)
