"""The native dialect: POST /score scores pairs, POST /select selects the best of several responses."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import ConfigDict, Field

from cappy.scoring.encoding import Pair
from serving.dialects.dialect import Body, Dialect, ErrorResponse, ScoredPairs, Texts, rank_pairs

Version = Annotated[str, Field(description="Version of the scorer: first 12 hexadecimal digits of its manifest's hash")]
ExpectedLabels = Annotated[
    list[float] | None,
    Field(description="Expected label of each pair, 0 to 1, by the scorer's calibration; null if it has none"),
]
Logits = Annotated[
    list[float],
    Field(description="The scores before the activation: the same order, without ties from rounding"),
]
ExpectedLabelsOfPool = Annotated[
    list[float] | None,
    Field(
        description="Expected label of each response, 0 to 1, as the best of the distinct responses of this request, "
        "by the scorer's calibration; null if it has none"
    ),
]
Scores = Annotated[list[float], Field(description="In the order of the request; higher is more correct, about 0 to 1")]


class ScoreRequest(Body):
    """Pairs to score."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"pairs": [["What is the capital of France?", "Paris"]]}]}
    )

    pairs: Annotated[
        list[tuple[str, str]],
        Field(min_length=1, fail_fast=True, description="[instruction, response] pairs, at least one"),
    ]
    version: Annotated[
        str | None, Field(description="Version to score with, the current or the former one; default: the current one")
    ] = None


class ScoreResponse(Body):
    """One score per pair."""

    scores: Scores
    logits: Logits
    expected: ExpectedLabels
    version: Version


class SelectRequest(Body):
    """Responses to choose from."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"instruction": "What is the capital of France?", "responses": ["Paris", "Rome"]}]
        }
    )

    instruction: str
    responses: Annotated[Texts, Field(description="Candidate responses, at least one")]


class SelectResponse(Body):
    """The selected response (the first of equally good ones) and the scores of all."""

    index: Annotated[int, Field(description="Index of the selected response, from 0")]
    response: str
    scores: Scores
    expected: ExpectedLabelsOfPool
    version: Version


class NativeErrorResponse(ErrorResponse):
    """An error."""

    detail: Annotated[str, Field(description="Problem and remedy, in one line")]


def error_body(status: int, message: str) -> Mapping[str, object]:
    """The body of an error in the native dialect."""
    return {"detail": message}


def _scores(request: ScoreRequest, result: ScoredPairs) -> ScoreResponse:
    expected = None if result.expected is None else list(result.expected)
    scores, logits = list(result.scores), list(result.logits)
    return ScoreResponse(scores=scores, logits=logits, expected=expected, version=result.version)


def _pick(request: SelectRequest, result: ScoredPairs) -> SelectResponse:
    (index, _), *_ = rank_pairs(result, result.scores, 1)
    expected = None if result.expected is None else list(result.expected)
    response, scores = request.responses[index], list(result.scores)
    return SelectResponse(index=index, response=response, scores=scores, expected=expected, version=result.version)


def _pairs(request: SelectRequest) -> list[Pair]:
    return [(request.instruction, response) for response in request.responses]


SCORE = Dialect(
    name="score",
    paths=("/score",),
    marker_fields=frozenset({"pairs"}),
    request=ScoreRequest,
    response=ScoreResponse,
    error_response=NativeErrorResponse,
    pairs=lambda request: request.pairs,
    requested_model=lambda request: request.version,
    answer=_scores,
    error_body=error_body,
    example_body='{"pairs": [["instruction", "response"], ...]}',
)
SELECT = Dialect(
    name="select",
    paths=("/select",),
    request=SelectRequest,
    response=SelectResponse,
    error_response=NativeErrorResponse,
    pairs=_pairs,
    one_pool=True,
    answer=_pick,
    error_body=error_body,
    example_body='{"instruction": "...", "responses": ["...", ...]}',
)
