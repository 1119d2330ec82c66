"""Families about dates: other notations, and days before and after."""

from collections.abc import Callable
from datetime import date, timedelta
from random import Random

from cappy.builtin.family import Content, Family
from cappy.builtin.vocabulary import words

_MONTHS = words("January February March April May June July August September October November December")
_DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
_EVENTS = words("""
    appointment birthday concert course exam exhibition festival flight holiday interview journey lecture match
    meeting party picnic race rehearsal trial visit wedding workshop
""")


def british(day: date) -> str:
    """3 May 2021"""
    return f"{day.day} {_MONTHS[day.month - 1]} {day.year}"


def american(day: date) -> str:
    """May 3, 2021"""
    return f"{_MONTHS[day.month - 1]} {day.day}, {day.year}"


def numeric(day: date) -> str:
    """2021-05-03"""
    return day.isoformat()


def slashed(day: date) -> str:
    """05/03/2021, the month first"""
    return f"{day.month:02}/{day.day:02}/{day.year}"


_NOTATIONS: dict[str, Callable[[date], str]] = {
    "day month year": british,
    "month day, year": american,
    "YYYY-MM-DD": numeric,
    "MM/DD/YYYY": slashed,
}


def draw_date_formats(rng: Random) -> Content:
    """A date in one of four notations, to be written in another."""
    day = _draw_date(rng)
    given, wanted = rng.sample(tuple(_NOTATIONS), 2)
    return Content(
        slots={"date": _NOTATIONS[given](day), "given": given, "wanted": wanted}, references=(_NOTATIONS[wanted](day),)
    )


def _draw_date(rng: Random) -> date:
    return date(2000, 1, 1) + timedelta(days=rng.randrange(365 * 30))


FAMILIES = (
    Family(
        name="date_formats",
        kind="generation",
        draw=draw_date_formats,
        templates=(
            "Write the date {date} as {wanted}; it is given as {given}.",
            "Date ({given}): {date}\nDate ({wanted}):",
            "{date} is a date in the form {given}. What is it in the form {wanted}?",
            "Change the notation of {date} from {given} to {wanted}.",
        ),
    ),
)
