"""The dialects of the service; if several share a path, the fields of a body decide, in this order."""

from collections.abc import Sequence

from serving.dialects import mlflow, open_inference, openrlhf, own, rerank, tei, vertex, vllm
from serving.dialects.dialect import Dialect, ScoredPairs, ServedModels

__all__ = ["DIALECTS", "Dialect", "ScoredPairs", "ServedModels"]

DIALECTS: Sequence[Dialect] = (
    own.SCORE,
    own.SELECT,
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
