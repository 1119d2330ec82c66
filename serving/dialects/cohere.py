"""Cohere's rerank, version 2: POST /v2/rerank."""

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import ConfigDict, Field, JsonValue

from cappy.scoring.encoding import Pair
from serving.dialects.dialect import Body, Count, Dialect, Name, Refused, Scored, Texts, Words, ranked

EXAMPLE: dict[str, JsonValue] = {"query": "What is the capital of France?", "documents": ["Rome", "Paris"], "top_n": 1}
SHAPE = '{"query": "the instruction", "documents": ["a response", ...]}'
Relevance = Annotated[float, Field(description="The score: higher is more correct, about 0 to 1")]


class CohereRequest(Body):
    """A query, which is the instruction, and documents, which are its responses."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    model: Name = None
    query: Words
    documents: Texts
    top_n: Annotated[Count | None, Field(description="How many of the best to give; all by default")] = None
    max_tokens_per_doc: Annotated[
        int | None,
        Field(strict=True, ge=4096, description="4096, Cohere's default, or more: the scorer's own length decides"),
    ] = None


class CohereResult(Body):
    """A document's place in the request and its score."""

    index: int
    relevance_score: Relevance


class ApiVersion(Body):
    """Which of Cohere's versions this is."""

    version: str


class Tokens(Body):
    """Tokens that the scorer read; of equal documents one."""

    input_tokens: int


class Meta(Body):
    """What the answer took."""

    api_version: ApiVersion
    billed_units: Tokens
    tokens: Tokens


class CohereResponse(Body):
    """Documents, best first, the first of equally good ones first."""

    id: str
    results: Sequence[CohereResult]
    meta: Meta


class CohereProblem(Refused):
    """What was wrong with a request."""

    message: str


def refuse(status: int, message: str) -> Mapping[str, object]:
    """Cohere's shape of a refusal."""
    return {"message": message}


def meta(version: str, tokens: int) -> Meta:
    """What an answer of a version of the interface took."""
    used = Tokens(input_tokens=tokens)
    return Meta(api_version=ApiVersion(version=version), billed_units=used, tokens=used)


def _pairs(request: CohereRequest) -> list[Pair]:
    return [(request.query, document) for document in request.documents]


def _answer(request: CohereRequest, scored: Scored) -> CohereResponse:
    results = [
        CohereResult(index=index, relevance_score=score)
        for index, score in ranked(scored, scored.scores, request.top_n)
    ]
    return CohereResponse(id=scored.request_id, results=results, meta=meta("2", scored.tokens))


COHERE = Dialect(
    name="cohere",
    paths=("/v2/rerank",),
    request=CohereRequest,
    response=CohereResponse,
    problem=CohereProblem,
    pairs=_pairs,
    answer=_answer,
    refuse=refuse,
    shape=SHAPE,
    marks=frozenset({"documents"}),
    invalid=400,
    named=lambda request: request.model,
)
