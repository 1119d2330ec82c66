"""The dialects of the service. If several share a path, the first one with a marker field in the body is used."""

from collections.abc import Sequence

from serving.dialects import mlflow, native, open_inference, openrlhf, rerank, tei, vertex, vllm
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
    vertex.VERTEX,
    vertex.KSERVE,
    open_inference.OPEN_INFERENCE,
    mlflow.MLFLOW,
    openrlhf.OPENRLHF,
)
