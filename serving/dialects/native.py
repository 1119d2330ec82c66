"""The native dialect: POST /score scores pairs, POST /select picks the best of several responses by the selector.

GET /selector returns the selector and the calibration, for a gateway that scores with this service. POST /get_reward is
OpenRLHF's remote reward model, whose errors have the same shape; a query is a prompt followed by its response.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from fastapi import FastAPI
from pydantic import ConfigDict, Field, FiniteFloat, JsonValue, TypeAdapter, model_validator

from cappy.errors import ConfigError
from cappy.scoring.encoding import Pair
from cappy.selection.linear import Candidates, Selector
from serving.dialects.dialect import Body, Dialect, ErrorResponse, Flag, NonEmptyText, ScoredPairs, ServedModels, Texts

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
    likelihoods: Annotated[
        list[FiniteFloat] | None,
        Field(description="Log-likelihood per token of each response under the LLM; default: unknown"),
    ] = None
    greedy: Annotated[
        int | None, Field(strict=True, description="Index of the LLM's greedy response; default: unknown")
    ] = None
    closed_choices: Annotated[
        Flag, Field(description="Whether the responses are all possible answers, so that they have no consensus")
    ] = False

    truncated: Annotated[
        tuple[Annotated[int, Field(strict=True)], ...],
        Field(description="Indices of responses that a length limit cut off: chosen only if all are"),
    ] = ()

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        self.candidates()
        return self

    def candidates(self) -> Candidates:
        """The candidates with what is known; raises ValueError if it does not fit the responses."""
        try:
            return Candidates(
                responses=self.responses,
                likelihoods=self.likelihoods,
                greedy=self.greedy,
                closed_choices=self.closed_choices,
                truncated=self.truncated,
            )
        except ConfigError as error:
            raise ValueError(str(error)) from None


class SelectResponse(Body):
    """The response that the selector picked (the first of equally good ones) and the numbers of all."""

    index: Annotated[int, Field(description="Index of the selected response, from 0")]
    response: str
    picked_by: Annotated[str, Field(description="The features of the selector with their weights, for what is known")]
    values: Annotated[
        list[float],
        Field(description="The selector's values in the order of the request; they compare only within it"),
    ]
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
    pool = request.candidates().with_scores(result.scores, result.logits)
    ranking = result.selector.rank(pool)
    return SelectResponse(
        index=ranking.picked,
        response=request.responses[ranking.picked],
        picked_by=result.selector.rule(result.selector.for_caller(pool).available).text,
        values=ranking.values.tolist(),
        scores=list(result.scores),
        expected=None if result.expected is None else list(result.expected),
        version=result.version,
    )


class SelectorResponse(Body):
    """The selector and the calibration of the current scorer, as in selector.json and calibration.json."""

    version: Version
    evaluation: Annotated[str, Field(description="The sha256 in the header X-Cappy-Evaluation-Sha256 of its scores")]
    selector: dict[str, Any]
    calibration: dict[str, Any] | None


def _add_routes(app: FastAPI, served_models: ServedModels) -> None:
    @app.get("/selector", tags=["served"])
    async def selector() -> SelectorResponse:
        """The selector that /select picks by, and the calibration of its picks."""
        model = served_models.models.current
        return SelectorResponse(
            version=model.version,
            evaluation=model.evaluation_hash,
            selector=TypeAdapter(Selector).dump_python(model.selector, mode="json"),
            calibration=None if model.calibration is None else model.calibration.to_dict(),
        )


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
    add_routes=_add_routes,
    answer=_pick,
    error_body=error_body,
    example_body='{"instruction": "...", "responses": ["...", ...]}',
)


REWARD_EXAMPLE: dict[str, JsonValue] = {"query": ["What is 1 + 1? 2"], "prompts": ["What is 1 + 1? "], "labels": ["2"]}


class RewardRequest(Body):
    """Queries and the prompt of each; `labels` are ignored, since a scorer needs no reference."""

    model_config = ConfigDict(json_schema_extra={"examples": [REWARD_EXAMPLE]})

    query: Texts
    prompts: Annotated[list[NonEmptyText], Field(min_length=1, fail_fast=True)]
    labels: list[JsonValue] | None = None

    @model_validator(mode="after")
    def _check_prompts(self) -> Self:
        if len(self.query) != len(self.prompts):
            raise ValueError(f"{len(self.query)} queries for {len(self.prompts)} prompts")
        for index, (query, prompt) in enumerate(zip(self.query, self.prompts, strict=True)):
            if prompt not in query:
                raise ValueError(f"query {index} does not contain its prompt, so its response cannot be extracted")
        return self


class RewardResponse(Body):
    """Rewards in the order of the queries; `scores` has the same values, `extra_logs` has values to plot."""

    rewards: Sequence[float]
    scores: Sequence[float]
    extra_logs: Mapping[str, Sequence[float]]


def _reward_pairs(request: RewardRequest) -> list[Pair]:
    """The pairs; the response is the text after the prompt; the prompt may be preceded by a begin-of-text token."""
    return [(prompt, query.partition(prompt)[2]) for query, prompt in zip(request.query, request.prompts, strict=True)]


def _rewards(request: RewardRequest, result: ScoredPairs) -> RewardResponse:
    logs = {"logits": result.logits, **({} if result.expected is None else {"expected": result.expected})}
    return RewardResponse(rewards=result.scores, scores=result.scores, extra_logs=logs)


OPENRLHF = Dialect(
    name="openrlhf",
    paths=("/get_reward",),
    request=RewardRequest,
    response=RewardResponse,
    error_response=NativeErrorResponse,
    pairs=_reward_pairs,
    answer=_rewards,
    error_body=error_body,
    example_body='{"query": ["prompt and response", ...], "prompts": ["prompt", ...]}',
)
