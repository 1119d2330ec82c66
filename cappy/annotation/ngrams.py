"""Metrics of n-grams, as sacrebleu computes them."""

from collections.abc import Sequence
from functools import cache

from sacrebleu.metrics import BLEU, CHRF


def chrf(references: Sequence[str], response: str) -> float:
    """chrF2 of a response, 0 to 1, the best over the references: character n-grams up to 6 (Popović 2015)."""
    return max((_chrf().sentence_score(response, [reference]).score / 100 for reference in references), default=0.0)


def bleu(references: Sequence[str], response: str) -> float:
    """Sentence BLEU, 0 to 1, over all references at once (Papineni et al. 2002).

    Tokens are 13a, n-grams up to 4 or to the response's length, zero counts smoothed by halving: a sentence is short,
    and one missing 4-gram would make it 0.
    """
    return min(1.0, _bleu().sentence_score(response, list(references)).score / 100) if references else 0.0


@cache
def _chrf() -> CHRF:
    return CHRF()


@cache
def _bleu() -> BLEU:
    return BLEU(effective_order=True)
