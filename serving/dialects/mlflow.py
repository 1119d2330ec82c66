"""MLflow's scoring server: POST /invocations with a table of instructions and responses in one of its four formats."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Self

from fastapi import FastAPI, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

import cappy
from cappy.scoring.encoding import Pair
from serving.dialects.dialect import Body, Dialect, ErrorResponse, NonEmptyText, ServedModels
from serving.dialects.vertex import UNREADY_RESPONSES, NoParameters

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
EXAMPLE: dict[str, JsonValue] = {"dataframe_split": {"columns": [*COLUMNS], "data": [["What is 1 + 1?", "2"]]}}


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
        return [_pair(index, row[instruction_index], row[response_index]) for index, row in enumerate(self.data)]


def _pair(row: int, instruction: JsonValue, response: JsonValue) -> Pair:
    if not isinstance(instruction, str) or not isinstance(response, str):
        raise ValueError(f"row {row} must have strings in the columns {' and '.join(COLUMNS)}")
    if not instruction:
        raise ValueError(f"row {row} has an empty instruction")
    return instruction, response


Rows = Annotated[list[InputRow], Field(min_length=1, fail_fast=True)]


class InvocationsRequest(Body):
    """A table in one of the four formats."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

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


def _pairs(request: InvocationsRequest) -> list[Pair]:
    table = next(table for name in FORMATS if (table := getattr(request, name)) is not None)
    if isinstance(table, Split):
        return table.pairs()
    if isinstance(table, Columns):
        return list(zip(table.instruction, table.response, strict=True))
    return [(row.instruction, row.response) for row in table]


def _error_body(status: int, message: str) -> Mapping[str, object]:
    return {"error_code": ERROR_CODES.get(status, "BAD_REQUEST"), "message": message}


def _add_routes(app: FastAPI, served_models: ServedModels) -> None:
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
    pairs=_pairs,
    answer=lambda request, result: InvocationsResponse(predictions=result.scores),
    error_body=_error_body,
    example_body='{"dataframe_split": {"columns": ["instruction", "response"], "data": [["...", "..."], ...]}}',
    invalid_status=400,
    add_routes=_add_routes,
)
