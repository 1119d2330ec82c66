"""vLLM's score API: POST /score and /v1/score, with current and older field names; its rerank API is in `rerank`."""

import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Self

from pydantic import AliasChoices, ConfigDict, Field, model_validator

from cappy.scoring.encoding import Pair
from serving.dialects.dialect import Body, Dialect, ErrorResponse, Flag, ModelName, NonEmptyText, ScoredPairs, Texts

Instructions = NonEmptyText | Annotated[list[NonEmptyText], Field(min_length=1, fail_fast=True)]
ERROR_TYPES: Mapping[int, str] = {
    401: "AuthenticationError",
    404: "NotFoundError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}


class VllmRequest(Body):
    """Instructions and responses: one instruction for all responses, or one per response."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"text_1": "What is the capital of France?", "text_2": ["Paris", "Rome"]}]}
    )

    model: ModelName = None
    text_1: Annotated[
        Instructions,
        Field(
            validation_alias=AliasChoices("text_1", "queries", "data_1"),
            description="The instruction, or one per response; also `queries`, `data_1`",
        ),
    ]
    text_2: Annotated[
        str | Texts,
        Field(
            validation_alias=AliasChoices("text_2", "documents", "items", "data_2"),
            description="The response or responses; also `documents`, `items`, `data_2`",
        ),
    ]
    use_activation: Annotated[Flag | None, Field(description="false returns logits instead of scores")] = None
    truncate_prompt_tokens: Annotated[Literal[-1] | None, Field(description="Only -1, the scorer's own maximum")] = None
    user: Annotated[str | None, Field(description="Ignored")] = None

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        num_instructions, num_responses = len(_as_list(self.text_1)), len(_as_list(self.text_2))
        if num_instructions not in (1, num_responses):
            raise ValueError(
                f"{num_instructions} instructions for {num_responses} responses; give one, or one per response"
            )
        return self


class VllmScore(Body):
    """The score of a pair."""

    index: int
    object: Literal["score"] = "score"
    score: float


class VllmUsage(Body):
    """Tokens that the scorer read; equal pairs count once."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: Literal[0] = 0


class VllmResponse(Body):
    """Scores in the order of the pairs; `created` in seconds since 1970."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: Sequence[VllmScore]
    usage: VllmUsage


class VllmError(Body):
    """Message, type, field and status of an error."""

    message: str
    type: str
    param: str | None
    code: int


class VllmErrorResponse(ErrorResponse):
    """An error."""

    error: VllmError


def _error_body(status: int, message: str) -> Mapping[str, object]:
    return {
        "error": {"message": message, "type": ERROR_TYPES.get(status, "BadRequestError"), "param": None, "code": status}
    }


def _as_list(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


def _pairs(request: VllmRequest) -> list[Pair]:
    instructions, responses = _as_list(request.text_1), _as_list(request.text_2)
    if len(instructions) == 1:
        instructions = instructions * len(responses)
    return list(zip(instructions, responses, strict=True))


def _answer(request: VllmRequest, result: ScoredPairs) -> VllmResponse:
    values = result.logits if request.use_activation is False else result.scores
    return VllmResponse(
        id=f"score-{result.request_id}",
        created=int(time.time()),
        model=result.model,
        data=[VllmScore(index=index, score=value) for index, value in enumerate(values)],
        usage=VllmUsage(prompt_tokens=result.tokens, total_tokens=result.tokens),
    )


VLLM = Dialect(
    name="vllm",
    paths=("/score", "/v1/score"),
    request=VllmRequest,
    response=VllmResponse,
    error_response=VllmErrorResponse,
    pairs=_pairs,
    answer=_answer,
    error_body=_error_body,
    example_body='{"text_1": "the instruction", "text_2": ["a response", ...]}',
    marker_fields=frozenset({"text_1", "text_2", "queries", "documents", "items", "data_1", "data_2"}),
    invalid_status=400,
    requested_model=lambda request: request.model,
)
