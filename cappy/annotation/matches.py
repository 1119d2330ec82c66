"""Metrics that look for the answer itself: the same text, the same number, the same words."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

from cappy.annotation.numbers import last_number, readings

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


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

    Equal to the evaluation script of SQuAD 2.0 to the last bit: words are lower-cased; ASCII punctuation and the
    articles a, an, the are dropped, so that $500 is 500 and C++ is C. Two texts without words are equal.
    """
    words = Counter(_words(response))
    return max((_f1(Counter(_words(reference)), words) for reference in references), default=0.0)


def _f1(target: Counter[str], words: Counter[str]) -> float:
    if not target or not words:
        return float(not target and not words)
    common = (target & words).total()
    if not common:
        return 0.0
    precision, recall = common / words.total(), common / target.total()
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _composed(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())
