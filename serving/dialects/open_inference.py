"""The Open Inference Protocol (KServe's version 2, Triton): tensors `instruction` and `response` in, `score` out.

Inputs are JSON or, with the binary tensor extension, bytes after the JSON; outputs are JSON.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Annotated, Literal, Self

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

import cappy
from cappy.scoring.encoding import Pair
from serving.bodies import Bounds
from serving.dialects.dialect import Body, Dialect, Flag, ScoredPairs, ServedModels
from serving.dialects.platforms import (
    UNKNOWN_MODEL_RESPONSES,
    UNREADY_RESPONSES,
    PlatformErrorResponse,
    error_body,
    model_state,
    unknown_model,
)

JSON_LENGTH_HEADER = "inference-header-content-length"
"""Header with the number of bytes of JSON at the start of a body; the rest is tensors."""
LENGTH_BYTES = 4
"""Each element of a binary tensor is preceded by its length, a little-endian integer of this many bytes."""
INPUTS = ("instruction", "response")
OUTPUT, DATATYPE = "score", "FP64"
EXAMPLE: dict[str, JsonValue] = {
    "inputs": [
        {"name": "instruction", "datatype": "BYTES", "shape": [1], "data": ["What is 1 + 1?"]},
        {"name": "response", "datatype": "BYTES", "shape": [1], "data": ["2"]},
    ]
}


class TensorParameters(Body):
    """Size in bytes of a tensor that follows the JSON."""

    binary_data_size: Annotated[int | None, Field(strict=True, ge=0)] = None


class Tensor(Body):
    """A tensor of strings."""

    name: Literal["instruction", "response"]
    shape: Annotated[list[Annotated[int, Field(strict=True, ge=1)]], Field(min_length=1, max_length=8)]
    datatype: Literal["BYTES"]
    parameters: TensorParameters | None = None
    data: Annotated[list[JsonValue], Field(min_length=1, description="Strings, flat or nested like the shape")]

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        count = 1
        for size in self.shape:
            count *= size
        texts = list(_flatten(self.data))
        if len(texts) != count:
            raise ValueError(f"{self.name} has {len(texts)} texts, but its shape has {count}")
        if self.name == "instruction" and "" in texts:
            raise ValueError("an instruction must not be empty")
        return self


class RequestedOutput(Body):
    """An output by name; it is always written as JSON."""

    class Form(Body):
        """Requested format; ignored."""

        binary_data: Flag = False

    name: Literal["score"]
    parameters: Form | None = None


class InferParameters(Body):
    """Whether outputs may be binary; ignored, since they are always JSON."""

    binary_data_output: Flag = False


class InferRequest(Body):
    """Two tensors of the same shape."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]}, protected_namespaces=())

    model_name: Annotated[str | None, Field(description="The name in the path, repeated by KServe's client")] = None
    id: str | None = None
    parameters: InferParameters | None = None
    inputs: Annotated[list[Tensor], Field(min_length=2, max_length=2)]
    outputs: Annotated[list[RequestedOutput] | None, Field(max_length=1)] = None

    @model_validator(mode="after")
    def _check_inputs(self) -> Self:
        if {tensor.name for tensor in self.inputs} != set(INPUTS):
            raise ValueError("the inputs must be instruction and response")
        if self.inputs[0].shape != self.inputs[1].shape:
            raise ValueError("instruction and response must have equal shapes")
        return self


class ScoreTensor(Body):
    """Scores in the shape of the inputs."""

    name: str = OUTPUT
    shape: list[int]
    datatype: str = DATATYPE
    data: Sequence[float]


class InferResponse(BaseModel):
    """One tensor, and the id of the request."""

    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    model_version: str
    id: str | None = None
    outputs: Sequence[ScoreTensor]


def _flatten(data: Sequence[JsonValue], depth: int = 8) -> Iterator[str]:
    for item in data:
        if isinstance(item, str):
            yield item
        elif isinstance(item, list) and depth:
            yield from _flatten(item, depth - 1)
        else:
            raise ValueError("data must be strings")


def _parse(body: bytes, headers: Mapping[str, str], bounds: Bounds) -> object:
    """Parses the JSON of a body and reads its binary tensors into `data`.

    Tensor elements count toward the limit on JSON values. Raises ValueError if the sizes are inconsistent.
    """
    header = headers.get(JSON_LENGTH_HEADER)
    if header is None:
        return bounds.parse(body)
    if not header.isascii() or not header.isdigit() or len(header) > 18 or int(header) > len(body):
        raise ValueError(f"{JSON_LENGTH_HEADER} must be the number of bytes of JSON")
    offset = int(header)
    value, remaining = bounds.parse(body[:offset]), bounds.max_values
    inputs = value.get("inputs") if isinstance(value, dict) else None
    for tensor in inputs if isinstance(inputs, list) else ():
        parameters = tensor.get("parameters") if isinstance(tensor, dict) else None
        size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
        if isinstance(size, int) and size >= 0:
            end = min(offset + size, len(body))
            tensor["data"] = list(islice(_read_elements(body, offset, end), remaining + 1))
            offset, remaining = end, remaining - len(tensor["data"])
            bounds.check_count(bounds.max_values - remaining)
    if offset < len(body):
        raise ValueError(f"the body has {len(body) - offset} bytes more than its tensors")
    return value


def _read_elements(body: bytes, offset: int, end: int) -> Iterator[str]:
    """Yields the strings of a binary tensor from `offset` to `end`, each preceded by its length."""
    while offset < end:
        start = offset + LENGTH_BYTES
        offset = start + int.from_bytes(body[offset:start], "little")
        if offset > end:
            raise ValueError("an element exceeds the size of its tensor")
        yield body[start:offset].decode()


def _pairs(request: InferRequest) -> list[Pair]:
    texts = {tensor.name: list(_flatten(tensor.data)) for tensor in request.inputs}
    return list(zip(texts["instruction"], texts["response"], strict=True))


def _answer(request: InferRequest, result: ScoredPairs) -> InferResponse:
    tensor = ScoreTensor(shape=request.inputs[0].shape, data=result.scores)
    return InferResponse(model_name=result.model, model_version=result.version, id=request.id, outputs=[tensor])


def _add_routes(app: FastAPI, served_models: ServedModels) -> None:
    models = served_models.models

    @app.get("/v2", tags=["served"])
    async def server_metadata() -> Mapping[str, object]:
        """Name, version and extensions of the service."""
        return {"name": "cappy", "version": cappy.__version__, "extensions": ["binary_tensor_data"]}

    @app.get("/v2/health/live", tags=["served"])
    async def server_live() -> Mapping[str, bool]:
        """Liveness of the process."""
        return {"live": True}

    @app.get("/v2/health/ready", tags=["served"], responses=UNREADY_RESPONSES)
    async def server_ready() -> Response:
        """Readiness of the service."""
        return JSONResponse({"ready": not models.unready_reason}, status_code=503 if models.unready_reason else 200)

    async def model_metadata(model: str, version: str = "") -> Response:
        """Names and types of the tensors."""
        return unknown_model(models, model, version) or JSONResponse(
            {
                "name": model,
                "versions": [models.current.version],
                "platform": "cappy",
                "inputs": [{"name": name, "datatype": "BYTES", "shape": [-1]} for name in INPUTS],
                "outputs": [{"name": OUTPUT, "datatype": DATATYPE, "shape": [-1]}],
            }
        )

    async def model_ready(model: str, version: str = "") -> Response:
        """Readiness of a model."""
        return model_state(models, model, version)

    for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        app.get(path, tags=["served"], responses=UNKNOWN_MODEL_RESPONSES)(model_metadata)
        app.get(f"{path}/ready", tags=["served"], responses={**UNKNOWN_MODEL_RESPONSES, **UNREADY_RESPONSES})(
            model_ready
        )


OPEN_INFERENCE = Dialect(
    name="open_inference",
    paths=("/v2/models/{model}/infer", "/v2/models/{model}/versions/{version}/infer"),
    request=InferRequest,
    response=InferResponse,
    error_response=PlatformErrorResponse,
    pairs=_pairs,
    answer=_answer,
    error_body=error_body,
    example_body='{"inputs": [{"name": "instruction", "datatype": "BYTES", "shape": [1], "data": ["..."]}, '
    '{"name": "response", "datatype": "BYTES", "shape": [1], "data": ["..."]}]}',
    invalid_status=400,
    exclude_none=True,
    requested_model=lambda request: request.model_name,
    # Triton's client sends no content type, KServe's sends this one with binary tensors.
    content_types=frozenset({"application/octet-stream", ""}),
    parse=_parse,
    add_routes=_add_routes,
)
