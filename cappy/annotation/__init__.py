"""Annotation: labels every candidate with its correctness, 0 to 1, by Rouge-L or another metric."""

from collections.abc import Sequence

__all__ = ["rouge_l"]


def rouge_l(references: Sequence[str], response: str, *, use_stemmer: bool = True) -> float:
    """Rouge-L F1 of a response, 0 to 1, the maximum over the references; equal to `rouge_score` to the last bit."""
    from cappy.annotation import rouge

    return rouge.rouge_l(references, response, use_stemmer=use_stemmer)
