"""Rouge-L of one response, equal to `rouge_score` to the last bit.

`rouge_score` 0.1.2 is the reference that the tests compare with. For many responses see `rouge_columns`, which gives
the same numbers many times faster.
"""

import re
from collections.abc import Hashable, Sequence
from functools import lru_cache

from nltk.stem.porter import PorterStemmer
from rapidfuzz.distance import LCSseq

_WORDS = re.compile(r"[a-z0-9]+")
_UNSEEN = re.compile(r"[^\W_a-z0-9]|[\u0300-\u036f]")
_STEMMER = PorterStemmer()
_LONGEST_CACHED = 4_096
"""Characters of the longest text whose tokens are kept: the cache stays small whatever the texts."""
_LONGEST_WORD = 64
_NO_SUFFIX_ENDS = frozenset("0123456789abfhjkopquvwxz")
"""Last characters of no suffix that Porter's rules know: such a word is its own stem."""


def rouge_l(references: Sequence[str], response: str, *, use_stemmer: bool = True) -> float:
    """Rouge-L F1 of a response, 0 to 1: the maximum over the references (Lin 2004; Cappy §4 scores it so).

    Tokens are lower-case runs of [a-z0-9]; longer than three characters they are Porter-stemmed. A response or a
    reference without tokens scores 0, non-Latin text among them.
    """
    tokens = tokenize(response, use_stemmer)
    return max((f_measure(tokenize(reference, use_stemmer), tokens) for reference in references), default=0.0)


def tokenize(text: str, use_stemmer: bool = True) -> tuple[str, ...]:
    """The tokens of a text, stemmed unless told otherwise."""
    return _kept(text, use_stemmer) if len(text) <= _LONGEST_CACHED else _tokens(text, use_stemmer)


def visible(text: str) -> bool:
    """Whether Rouge-L sees anything of a text."""
    return _WORDS.search(text.lower()) is not None


def partly_visible(text: str) -> bool:
    """Whether Rouge-L sees something of a text, but not all of its letters and digits: 2008年, naïve, 5 m²."""
    if text.isascii():
        return False
    lowered = text.lower()
    return _WORDS.search(lowered) is not None and _UNSEEN.search(lowered) is not None


def f_measure(target: Sequence[Hashable], prediction: Sequence[Hashable]) -> float:
    """F1 of the longest common subsequence of two token sequences, 0 to 1; the operations in the reference's order."""
    if not target or not prediction:
        return 0.0
    common = LCSseq.similarity(target, prediction)
    precision = common / len(prediction)
    recall = common / len(target)
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def stem(word: str) -> str:
    """The token that a word counts as: longer than three characters, its Porter stem."""
    if len(word) <= 3 or word[-1] in _NO_SUFFIX_ENDS:
        return word
    return _stemmed(word) if len(word) <= _LONGEST_WORD else _STEMMER.stem(word)


def _tokens(text: str, use_stemmer: bool) -> tuple[str, ...]:
    words = _WORDS.findall(text.lower())
    return tuple(map(stem, words)) if use_stemmer else tuple(words)


_kept = lru_cache(maxsize=8_192)(_tokens)


@lru_cache(maxsize=131_072)
def _stemmed(word: str) -> str:
    return str(_STEMMER.stem(word))
