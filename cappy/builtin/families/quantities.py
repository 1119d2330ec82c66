"""Families about numbers: in words, and in other units."""

from random import Random

from cappy.builtin.family import Content, Family
from cappy.builtin.vocabulary import NUMBER_WORDS

_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_UNITS = (
    ("minutes", "hours", "minutes", 60, "wait for"),
    ("seconds", "minutes", "seconds", 60, "look for"),
    ("days", "weeks", "days", 7, "wait for"),
    ("months", "years", "months", 12, "save for"),
    ("hours", "days", "hours", 24, "look for"),
    ("inches", "feet", "inches", 12, "measure a wall beside"),
    ("cents", "dollars", "cents", 100, "pay for"),
    ("grams", "kilograms", "grams", 1000, "send"),
)


def in_words(number: int) -> str:
    """A whole number from 0 to 999,999 in English words."""
    if number < 20:
        return NUMBER_WORDS[number]
    if number < 100:
        tens, unit = divmod(number, 10)
        return _TENS[tens - 2] + (f"-{NUMBER_WORDS[unit]}" if unit else "")
    name, size = ("hundred", 100) if number < 1000 else ("thousand", 1000)
    many, rest = divmod(number, size)
    return f"{in_words(many)} {name}" + (f" {in_words(rest)}" if rest else "")


def draw_number_words(rng: Random) -> Content:
    """A number of three to five digits, to be written in words."""
    number = rng.randint(*rng.choice(((100, 999), (1_000, 9_999), (1_000, 9_999), (10_000, 99_999))))
    return Content(slots={"number": str(number)}, references=(in_words(number),))


FAMILIES = (
    Family(
        name="number_words",
        kind="generation",
        draw=draw_number_words,
        templates=(
            "Write {number} in words.",
            "How do you spell out the number {number}?",
            "Number: {number}\nIn words:",
            "Say {number} aloud.",
        ),
    ),
)
