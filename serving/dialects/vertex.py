"""Vertex AI's prediction requests, which KServe's version 1 speaks too: instances in, predictions out."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import ConfigDict, Field, JsonValue

from cappy.scoring.encoding import Pair
from serving.dialects.dialect import Body, Dialect, Refused, Scored, Words

EXAMPLE: dict[str, JsonValue] = {"instances": [{"instruction": "What is 1 + 1?", "response": "2"}]}


class Instance(Body):
    """An instruction and a response to it."""

    instruction: Words
    response: str


class NoParameters(Body):
    """Scoring knows no parameters."""


class InstancesRequest(Body):
    """Pairs, as objects or as lists of two."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    instances: Annotated[list[Instance | tuple[Words, str]], Field(min_length=1, fail_fast=True)]
    parameters: NoParameters | None = None


class Prediction(Body):
    """A pair's score, and the label to expect, 0 to 1, where the scorer is calibrated."""

    score: float
    expected: float | None = None


class PredictionsResponse(Body):
    """Predictions in the order of the instances."""

    predictions: Sequence[Prediction]


class PlatformProblem(Refused):
    """What was wrong with a request."""

    error: str


def refuse(status: int, message: str) -> Mapping[str, Any]:
    """A refusal as model platforms have it."""
    return {"error": message}


def pairs(request: InstancesRequest) -> list[Pair]:
    """The pairs of all instances."""
    return [
        (instance.instruction, instance.response) if isinstance(instance, Instance) else instance
        for instance in request.instances
    ]


def answer(request: InstancesRequest, scored: Scored) -> PredictionsResponse:
    """A prediction for each instance."""
    expected: Sequence[float | None] = scored.expected or [None] * len(scored.scores)
    return PredictionsResponse(
        predictions=[
            Prediction(score=score, expected=label) for score, label in zip(scored.scores, expected, strict=True)
        ]
    )


VERTEX = Dialect(
    name="vertex",
    paths=("/predict",),
    request=InstancesRequest,
    response=PredictionsResponse,
    problem=PlatformProblem,
    pairs=pairs,
    answer=answer,
    refuse=refuse,
    shape='{"instances": [{"instruction": "...", "response": "..."}, ...]}',
    marks=frozenset({"instances"}),
    invalid=400,
    bare=True,
)
