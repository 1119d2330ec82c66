"""OpenRLHF's remote reward model: POST /get_reward; a query is a prompt followed by its response."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Self

from pydantic import ConfigDict, Field, JsonValue, model_validator

from cappy.scoring.encoding import Pair
from serving.dialects.dialect import Body, Dialect, NonEmptyText, ScoredPairs, Texts
from serving.dialects.native import NativeErrorResponse, error_body

EXAMPLE: dict[str, JsonValue] = {"query": ["What is 1 + 1? 2"], "prompts": ["What is 1 + 1? "], "labels": ["2"]}


class RewardRequest(Body):
    """Queries and the prompt of each; `labels` are ignored, since a scorer needs no reference."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

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


def _pairs(request: RewardRequest) -> list[Pair]:
    """The pairs; the response is the text after the prompt; the prompt may be preceded by a begin-of-text token."""
    return [(prompt, query.partition(prompt)[2]) for query, prompt in zip(request.query, request.prompts, strict=True)]


def _answer(request: RewardRequest, result: ScoredPairs) -> RewardResponse:
    logs = {"logits": result.logits, **({} if result.expected is None else {"expected": result.expected})}
    return RewardResponse(rewards=result.scores, scores=result.scores, extra_logs=logs)


OPENRLHF = Dialect(
    name="openrlhf",
    paths=("/get_reward",),
    request=RewardRequest,
    response=RewardResponse,
    error_response=NativeErrorResponse,
    pairs=_pairs,
    answer=_answer,
    error_body=error_body,
    example_body='{"query": ["prompt and response", ...], "prompts": ["prompt", ...]}',
)
