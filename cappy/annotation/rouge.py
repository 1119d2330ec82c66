"""Rouge-L, equal to `rouge_score` with its stemmer to the last bit, and fast enough for every candidate there is.

The tokens are integers from one table per process, so that equal words are stemmed once, and the longest common
subsequence is rapidfuzz's bit-parallel one. `rouge_score` 0.1.2 is the reference that the tests compare with.
"""

import re
from collections.abc import Hashable, Sequence
from functools import lru_cache

from nltk.stem.porter import PorterStemmer
from rapidfuzz.distance import LCSseq

_WORDS = re.compile(r"[a-z0-9]+")
_STEMMER = PorterStemmer()
_IDS: dict[str, int] = {}


def rouge_l(references: Sequence[str], response: str, *, use_stemmer: bool = True) -> float:
    """Rouge-L F1 of a response, 0 to 1: the maximum over the references (Lin 2004; Cappy §4 scores it so).

    Tokens are lower-case runs of [a-z0-9]; longer than three characters they are Porter-stemmed. A response or a
    reference without tokens scores 0, non-Latin text among them.
    """
    tokens = tokenize(response, use_stemmer)
    return max((f_measure(tokenize(reference, use_stemmer), tokens) for reference in references), default=0.0)


@lru_cache(maxsize=65_536)
def tokenize(text: str, use_stemmer: bool = True) -> tuple[int, ...]:
    """The tokens of a text as integers that are equal where the stemmed words are."""
    stem = _stemmed if use_stemmer else _identifier
    return tuple(stem(word) for word in _WORDS.findall(text.lower()))


def f_measure(target: Sequence[Hashable], prediction: Sequence[Hashable]) -> float:
    """F1 of the longest common subsequence of two token sequences, 0 to 1; the operations in the reference's order."""
    if not target or not prediction:
        return 0.0
    common = LCSseq.similarity(target, prediction)
    precision = common / len(prediction)
    recall = common / len(target)
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


@lru_cache(maxsize=1_000_000)
def _stemmed(word: str) -> int:
    return _identifier(_STEMMER.stem(word) if len(word) > 3 else word)


def _identifier(word: str) -> int:
    return _IDS.setdefault(word, len(_IDS))
