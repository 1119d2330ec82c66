"""The dialects of the service. If several share a path, the first one with a marker field in the body is used."""

from collections.abc import Sequence

from serving.dialects import native, open_inference, platforms, rerank, tei, vllm
from serving.dialects.dialect import Dialect, ScoredPairs, ServedModels

__all__ = ["DIALECTS", "Dialect", "ScoredPairs", "ServedModels"]

DIALECTS: Sequence[Dialect] = (
    native.SCORE,
    native.SELECT,
    rerank.RERANK,
    rerank.COHERE,
    tei.RERANK,
    tei.PREDICT,
    vllm.VLLM,
    platforms.VERTEX,
    platforms.KSERVE,
    open_inference.OPEN_INFERENCE,
    platforms.MLFLOW,
    native.OPENRLHF,
)
