"""Rouge-L for every script: the published one sees [a-z0-9] alone and gives all other text 0."""

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import regex

from cappy.annotation.rouge import f_measure

# Scripts that put no space between words: there a token is one character with its marks.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
_TOKEN = regex.compile(rf"(?V1)[[{_UNSPACED}]&&\p{{L}}]\p{{M}}*|[[\p{{L}}\p{{N}}\p{{M}}]--[[{_UNSPACED}]&&\p{{L}}]]+")


def rouge_l(references: Sequence[str], response: str) -> float:
    """Rouge-L F1 of a response, 0 to 1, the best over the references, on the words of any script.

    Words are folded in case and width (NFKC), keep their marks and are not stemmed. In scripts without spaces every
    character with its marks is a word.
    """
    tokens = tokenize(response)
    return max((f_measure(tokenize(reference), tokens) for reference in references), default=0.0)


@lru_cache(maxsize=65_536)
def tokenize(text: str) -> tuple[str, ...]:
    """The words of a text, in order."""
    return tuple(_TOKEN.findall(unicodedata.normalize("NFKC", text).casefold()))
