"""Text Embeddings Inference: POST /rerank for responses to one instruction, POST /predict for pairs."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from fastapi import FastAPI
from pydantic import ConfigDict, Field, RootModel

import cappy
from cappy.scoring.encoding import Pair
from serving.dialects.dialect import (
    Body,
    Dialect,
    ErrorResponse,
    Flag,
    NonEmptyText,
    ScoredPairs,
    ServedModels,
    Texts,
    rank_pairs,
)

LABEL = "LABEL_0"
"""transformers' default name for the only output of a model."""
Raw = Annotated[Flag, Field(description="Whether to return logits instead of scores (about 0 to 1)")]
Truncate = Annotated[
    Flag | None,
    Field(
        description="false refuses pairs that are longer than the scorer's maximum; else the instruction is truncated"
    ),
]
ErrorType = Literal["validation", "overloaded", "unhealthy", "unauthorized", "backend"]
ERROR_TYPES: Mapping[int, ErrorType] = {
    401: "unauthorized",
    429: "overloaded",
    503: "unhealthy",
    500: "backend",
    504: "backend",
}


class _Options(Body):
    raw_scores: Raw = False
    truncate: Truncate = None
    truncation_direction: Annotated[
        Literal["Right", "right"],
        Field(description="Only Right is accepted; what is removed is the middle of the instruction"),
    ] = "Right"


class TeiRerankRequest(_Options):
    """An instruction (`query`) and responses to it."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"query": "What is the capital of France?", "texts": ["Rome", "Paris"]}]}
    )

    query: NonEmptyText
    texts: Texts
    return_text: Flag = False


class TeiRank(Body):
    """A text's index in the request, its score, and the text if it was requested."""

    index: int
    score: float
    text: str | None = None


class TeiRerankResponse(RootModel[Sequence[TeiRank]]):
    """Texts, best first; equally good ones in the order of the request."""


class TeiPredictRequest(_Options):
    """A pair of instruction and response, or a list of them."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"inputs": [["What is 1 + 1?", "2"]]}]})

    inputs: tuple[NonEmptyText, str] | Annotated[list[tuple[NonEmptyText, str]], Field(min_length=1, fail_fast=True)]


class TeiPrediction(Body):
    """The score of a pair, with the name of the only label."""

    score: float
    label: str


class TeiPredictResponse(RootModel[Sequence[TeiPrediction] | Sequence[Sequence[TeiPrediction]]]):
    """A list per pair; a single list if the request is one pair instead of a list of pairs."""


class TeiErrorResponse(ErrorResponse):
    """An error."""

    error: str
    error_type: ErrorType


def _error_body(status: int, message: str) -> Mapping[str, object]:
    return {"error": message, "error_type": ERROR_TYPES.get(status, "validation")}


def _values(request: _Options, result: ScoredPairs) -> Sequence[float]:
    return result.logits if request.raw_scores else result.scores


def _rerank_pairs(request: TeiRerankRequest) -> list[Pair]:
    return [(request.query, text) for text in request.texts]


def _ranks(request: TeiRerankRequest, result: ScoredPairs) -> TeiRerankResponse:
    return TeiRerankResponse(
        [
            TeiRank(index=index, score=value, text=request.texts[index] if request.return_text else None)
            for index, value in rank_pairs(result, _values(request, result))
        ]
    )


def _predict_pairs(request: TeiPredictRequest) -> list[Pair]:
    return [request.inputs] if isinstance(request.inputs, tuple) else request.inputs


def _predictions(request: TeiPredictRequest, result: ScoredPairs) -> TeiPredictResponse:
    predictions = [[TeiPrediction(score=value, label=LABEL)] for value in _values(request, result)]
    return TeiPredictResponse(predictions[0] if isinstance(request.inputs, tuple) else predictions)


def _add_routes(app: FastAPI, served_models: ServedModels) -> None:
    @app.get("/info", tags=["served"])
    async def info() -> Mapping[str, object]:
        """Model information in the format of Text Embeddings Inference."""
        model = served_models.models.current
        return {
            "model_id": model.name,
            "model_sha": model.sha256,
            "model_dtype": model.precision,
            "model_type": {"reranker": {"id2label": {"0": LABEL}, "label2id": {LABEL: 0}}},
            "max_batch_tokens": served_models.batch_tokens,
            "max_client_batch_size": served_models.limits.max_pairs,
            "auto_truncate": True,
            "version": cappy.__version__,
        }


RERANK = Dialect(
    name="tei_rerank",
    paths=("/rerank",),
    request=TeiRerankRequest,
    response=TeiRerankResponse,
    error_response=TeiErrorResponse,
    pairs=_rerank_pairs,
    answer=_ranks,
    error_body=_error_body,
    example_body='{"query": "the instruction", "texts": ["a response", ...]}',
    marker_fields=frozenset({"texts"}),
    exclude_none=True,
    forbids_truncation=lambda request: request.truncate is False,
    add_routes=_add_routes,
)
PREDICT = Dialect(
    name="tei_predict",
    paths=("/predict",),
    request=TeiPredictRequest,
    response=TeiPredictResponse,
    error_response=TeiErrorResponse,
    pairs=_predict_pairs,
    answer=_predictions,
    error_body=_error_body,
    example_body='{"inputs": [["instruction", "response"], ...]}',
    marker_fields=frozenset({"inputs"}),
    exclude_none=True,
    forbids_truncation=lambda request: request.truncate is False,
)
