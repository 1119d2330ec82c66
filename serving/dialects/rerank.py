"""POST /v2/rerank for clients of Cohere; /v1/rerank and /rerank for those of Jina, of Cohere's version 1 and of vLLM.

The requests of the latter three look the same, so a response has the fields of all three, and a refusal those of Jina
and Cohere.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from cappy.scoring.encoding import Pair
from serving.dialects.dialect import (
    Body,
    Count,
    Dialect,
    ErrorResponse,
    Flag,
    ModelName,
    NonEmptyText,
    ScoredPairs,
    Texts,
    rank_pairs,
)

EXAMPLE: dict[str, JsonValue] = {"query": "What is the capital of France?", "documents": ["Rome", "Paris"], "top_n": 1}
EXAMPLE_BODY = '{"query": "the instruction", "documents": ["a response", ...]}'
Relevance = Annotated[float, Field(description="The score: higher is more correct, about 0 to 1")]


class CohereRequest(Body):
    """A query, which is the instruction, and documents, which are its responses."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    model: ModelName = None
    query: NonEmptyText
    documents: Texts
    top_n: Annotated[Count | None, Field(description="How many of the best to return; default: all")] = None
    max_tokens_per_doc: Annotated[
        int | None,
        Field(strict=True, ge=4096, description="At least 4096, Cohere's default; the scorer's own maximum applies"),
    ] = None


class CohereResult(Body):
    """A document's index in the request and its score."""

    index: int
    relevance_score: Relevance


class ApiVersion(Body):
    """Version of Cohere's API."""

    version: str


class Tokens(Body):
    """Tokens that the scorer read; equal documents count once."""

    input_tokens: int


class Meta(Body):
    """Usage."""

    api_version: ApiVersion
    billed_units: Tokens
    tokens: Tokens


class CohereResponse(Body):
    """Documents, best first; equally good ones in the order of the request."""

    id: str
    results: Sequence[CohereResult]
    meta: Meta


class CohereErrorResponse(ErrorResponse):
    """An error."""

    message: str


def _cohere_error_body(status: int, message: str) -> Mapping[str, object]:
    return {"message": message}


def make_meta(version: str, tokens: int) -> Meta:
    """The usage in a response of this version of Cohere's API."""
    num_tokens = Tokens(input_tokens=tokens)
    return Meta(api_version=ApiVersion(version=version), billed_units=num_tokens, tokens=num_tokens)


def _pairs_cohere(request: CohereRequest) -> list[Pair]:
    return [(request.query, document) for document in request.documents]


def _answer_cohere(request: CohereRequest, result: ScoredPairs) -> CohereResponse:
    results = [
        CohereResult(index=index, relevance_score=score)
        for index, score in rank_pairs(result, result.scores, request.top_n)
    ]
    return CohereResponse(id=result.request_id, results=results, meta=make_meta("2", result.tokens))


COHERE = Dialect(
    name="cohere",
    paths=("/v2/rerank",),
    request=CohereRequest,
    response=CohereResponse,
    error_response=CohereErrorResponse,
    pairs=_pairs_cohere,
    answer=_answer_cohere,
    error_body=_cohere_error_body,
    example_body=EXAMPLE_BODY,
    marker_fields=frozenset({"documents"}),
    invalid_status=400,
    requested_model=lambda request: request.model,
)


class Passage(BaseModel):
    """A document with its text; its other fields are returned unchanged."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, str] = Field(init=False)

    text: str


class RerankRequest(Body):
    """A query, which is the instruction, and documents, which are its responses."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    model: ModelName = None
    query: NonEmptyText
    documents: Annotated[list[str | Passage], Field(min_length=1, fail_fast=True)]
    top_n: Annotated[
        int | None, Field(strict=True, ge=0, description="How many of the best to return; default and 0: all")
    ] = None
    return_documents: Annotated[
        Flag | None, Field(description="Whether to return the documents too; default: true")
    ] = None
    rank_fields: Annotated[
        list[Literal["text"]] | None, Field(max_length=8, description="A parameter of Cohere; only the text is scored")
    ] = None
    max_chunks_per_doc: Annotated[
        Count | None, Field(description="A parameter of Cohere; a document is always one chunk")
    ] = None
    truncation: Annotated[
        Literal[True] | None, Field(description="A parameter of Jina; pairs that are too long are always truncated")
    ] = None
    use_activation: Annotated[
        Flag | None, Field(description="A parameter of vLLM; false returns logits instead of scores")
    ] = None


class RerankResult(Body):
    """A document's index in the request, its score, and the document unless the request excludes it."""

    index: int
    relevance_score: Relevance
    document: Passage | None = None


class RerankUsage(Body):
    """Tokens that the scorer read; equal documents count once."""

    prompt_tokens: int
    total_tokens: int


class RerankResponse(Body):
    """Documents, best first; equally good ones in the order of the request."""

    id: str
    model: str
    results: Sequence[RerankResult]
    usage: RerankUsage
    meta: Meta


class RerankErrorResponse(ErrorResponse):
    """An error, for clients of Cohere and Jina."""

    message: str
    detail: str


def _passage(document: str | Passage) -> Passage:
    return Passage(text=document) if isinstance(document, str) else document


def _pairs(request: RerankRequest) -> list[Pair]:
    return [(request.query, _passage(document).text) for document in request.documents]


def _answer(request: RerankRequest, result: ScoredPairs) -> RerankResponse:
    values = result.logits if request.use_activation is False else result.scores
    with_documents = request.return_documents is not False
    results = [
        RerankResult(
            index=index,
            relevance_score=value,
            document=_passage(request.documents[index]) if with_documents else None,
        )
        for index, value in rank_pairs(result, values, request.top_n or None)
    ]
    return RerankResponse(
        id=result.request_id,
        model=result.model,
        results=results,
        usage=RerankUsage(prompt_tokens=result.tokens, total_tokens=result.tokens),
        meta=make_meta("1", result.tokens),
    )


def _error_body(status: int, message: str) -> Mapping[str, object]:
    return {"message": message, "detail": message}


RERANK = Dialect(
    name="rerank",
    paths=("/v1/rerank", "/rerank"),
    request=RerankRequest,
    response=RerankResponse,
    error_response=RerankErrorResponse,
    pairs=_pairs,
    answer=_answer,
    error_body=_error_body,
    example_body=EXAMPLE_BODY,
    marker_fields=frozenset({"documents"}),
    invalid_status=400,
    exclude_none=True,
    requested_model=lambda request: request.model,
)
