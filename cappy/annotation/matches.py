"""Metrics that look for the answer itself: the same text, the same number, the same words."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from cappy.annotation.numbers import last_number, readings

_ARTICLES = frozenset({"a", "an", "the"})


def exact_match(references: Sequence[str], response: str) -> float:
    """1 if the response is one of the references, Unicode's composed forms and runs of white space apart; else 0.

    Case and punctuation count.
    """
    wanted = _composed(response)
    return float(any(_composed(reference) == wanted for reference in references))


def numeric_match(references: Sequence[str], response: str) -> float:
    """1 if the last number of the response equals the last number of a reference, else 0; see `last_number`.

    The last, because worked solutions end with their answer (GSM8K's do; Cobbe et al. 2021); in LaTeX the last box's
    (MATH's; Hendrycks et al. 2021). Signs and decimals count, spelling does not: 5 and -5 differ; 1,000.0, 1 000 and
    1000 do not. Where a comma of the response may be a decimal comma or a list's, either reading will do.
    """
    found = readings(response)
    return float(found[0] is not None and any(last_number(reference) in found for reference in references))


def token_f1(references: Sequence[str], response: str) -> float:
    """F1 of the words in common, in whatever order; the best over the references (SQuAD; Rajpurkar et al. 2016, §6.1).

    Words are lower-cased; punctuation and English articles are dropped. Two texts without words are equal.
    """
    words = Counter(_words(response))
    return max((_f1(Counter(_words(reference)), words) for reference in references), default=0.0)


def _f1(target: Counter[str], words: Counter[str]) -> float:
    if not target or not words:
        return float(not target and not words)
    common = (target & words).total()
    return 2 * common / (target.total() + words.total())


def _words(text: str) -> Iterable[str]:
    kept = "".join(character for character in text.lower() if not unicodedata.category(character).startswith("P"))
    return (word for word in kept.split() if word not in _ARTICLES)


def _composed(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())
