"""Metrics that look for the answer itself: the same text, the same number, the same words."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from decimal import Decimal

_NUMBER = re.compile(r"((?<!\w)[-+−])?([0-9][0-9,]*(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)")
_GROUPED = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_ARTICLES = frozenset({"a", "an", "the"})


def exact_match(references: Sequence[str], response: str) -> float:
    """1 if the response is one of the references, Unicode's composed forms and runs of white space apart; else 0.

    Case and punctuation count.
    """
    wanted = _composed(response)
    return float(any(_composed(reference) == wanted for reference in references))


def numeric_match(references: Sequence[str], response: str) -> float:
    """1 if the last number of the response equals the last number of a reference, else 0.

    The last, because worked solutions end with their answer (GSM8K's do). Signs and decimals count, commas between
    groups of three digits do not: 5 and -5 differ, 1,000.0 and 1000 do not. A fraction is two numbers.
    """
    found = last_number(response)
    return float(found is not None and any(last_number(reference) == found for reference in references))


def last_number(text: str) -> Decimal | None:
    """The last number written in ASCII digits, or None."""
    found = _NUMBER.findall(text)
    if not found:
        return None
    sign, digits = found[-1]
    digits = digits.rstrip(",")
    if "," in digits and not _GROUPED.fullmatch(digits):
        # A list of numbers without spaces.
        sign, digits = "", digits.rpartition(",")[2]
    number = Decimal(digits.replace(",", ""))
    return -number if sign in ("-", "−") else number


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
