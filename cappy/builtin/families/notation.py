"""Families that convert content to another notation: numbers in words, dates, records in prose."""

from collections.abc import Callable
from datetime import date, timedelta
from random import Random

from cappy.builtin.families import Content, Family
from cappy.builtin.vocabulary import (
    CATEGORIES,
    CITIES,
    COLOURS,
    NAMES,
    NUMBER_WORDS,
    SURNAMES,
    THINGS,
    plural,
    with_article,
    words,
)

_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def in_words(number: int) -> str:
    """A whole number from 0 to 999,999 in English words."""
    if number < 20:
        return NUMBER_WORDS[number]
    if number < 100:
        tens, unit = divmod(number, 10)
        return _TENS[tens - 2] + (f"-{NUMBER_WORDS[unit]}" if unit else "")
    name, size = ("hundred", 100) if number < 1000 else ("thousand", 1000)
    multiple, rest = divmod(number, size)
    return f"{in_words(multiple)} {name}" + (f" {in_words(rest)}" if rest else "")


def draw_number_words(rng: Random) -> Content:
    """A number of three to five digits, to be written in words."""
    number = rng.randint(*rng.choice(((100, 999), (1_000, 9_999), (1_000, 9_999), (10_000, 99_999))))
    return Content(slots={"number": str(number)}, references=(in_words(number),))


_MONTHS = words("January February March April May June July August September October November December")


def british(day: date) -> str:
    """The date in the form 3 May 2021."""
    return f"{day.day} {_MONTHS[day.month - 1]} {day.year}"


def american(day: date) -> str:
    """The date in the form May 3, 2021."""
    return f"{_MONTHS[day.month - 1]} {day.day}, {day.year}"


def numeric(day: date) -> str:
    """The date in the form 2021-05-03."""
    return day.isoformat()


def with_slashes(day: date) -> str:
    """The date in the form 05/03/2021, with the month first."""
    return f"{day.month:02}/{day.day:02}/{day.year}"


_NOTATIONS: dict[str, Callable[[date], str]] = {
    "day month year": british,
    "month day, year": american,
    "YYYY-MM-DD": numeric,
    "MM/DD/YYYY": with_slashes,
}


def draw_date_formats(rng: Random) -> Content:
    """A date in one of four notations, to be written in another."""
    day = _draw_date(rng)
    source, target = rng.sample(tuple(_NOTATIONS), 2)
    return Content(
        slots={"date": _NOTATIONS[source](day), "given": source, "wanted": target},
        references=(_NOTATIONS[target](day),),
    )


def _draw_date(rng: Random) -> date:
    return date(2000, 1, 1) + timedelta(days=rng.randrange(365 * 30))


_CUISINES = words("""
    African American Arabian Brazilian Chinese Cuban Egyptian English Ethiopian French German Greek Hungarian Indian
    Indonesian Irish Italian Japanese Korean Lebanese Mexican Moroccan Peruvian Polish Portuguese Russian Spanish
    Swedish Thai Turkish Vietnamese
""")
_AREAS = ("city centre", "riverside", "old town", "harbour", "suburbs", "north side", "market square", "university")
_PRICES = ("cheap", "affordable", "expensive", "high-priced")
_HOBBIES = words("""
    archery astronomy baking ballet boxing chess cooking cycling dancing drawing fencing fishing football gardening
    golf hiking knitting painting photography poetry pottery reading rowing running sailing sculpture singing skating
    skiing surfing swimming tennis theatre yoga
""")


def draw_restaurant_description(rng: Random) -> Content:
    """Name, food, price, area and sometimes a neighbour of a restaurant; three wordings are accepted."""
    first, second = rng.sample((*THINGS, *CATEGORIES["animals"]), 2)
    name = f"The {rng.choice(COLOURS).title()} {first.title()}"
    neighbour = f"The {second.title()} {rng.choice(('Inn', 'Hotel', 'Cafe', 'Bar'))}"
    food, price, area = rng.choice(_CUISINES), rng.choice(_PRICES), rng.choice(_AREAS)
    near = rng.random() < 0.5
    beside = f" near {neighbour}" if near else ""
    record = f"name = {name} | food = {food} | price = {price} | area = {area}"
    return Content(
        slots={"record": f"{record} | near = {neighbour}" if near else record},
        references=(
            f"{name} is {with_article(price)} {food} restaurant in the {area}{beside}.",
            f"{name} in the {area}{beside} serves {price} {food} food.",
            f"In the {area}{beside} you can eat {price} {food} food at {name}.",
        ),
    )


def draw_person_description(rng: Random) -> Content:
    """Name, age, job, home and hobby of a person; three wordings are accepted."""
    name = f"{rng.choice(NAMES)} {rng.choice(SURNAMES)}"
    age, job = rng.randint(20, 79), rng.choice(CATEGORIES["jobs"])
    city, hobby, collects = rng.choice(CITIES), rng.choice(_HOBBIES), plural(rng.choice(THINGS))
    return Content(
        slots={"record": f"name: {name}; age: {age}; job: {job}; city: {city}; hobby: {hobby}; collects: {collects}"},
        references=(
            f"{name} is a {age} year old {job} from {city} who enjoys {hobby} and collects {collects}.",
            f"{name}, {age}, works as {with_article(job)} in {city}, likes {hobby} and collects {collects}.",
            f"The {age} year old {job} {name} lives in {city}, collects {collects} and enjoys {hobby}.",
        ),
    )


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
    Family(
        name="restaurant_description",
        kind="generation",
        draw=draw_restaurant_description,
        templates=(
            "Describe the restaurant in a sentence: {record}",
            "Record: {record}\nText:",
            "Write a line for a travel guide from these data. {record}",
            "Tell a guest about this place: {record}",
        ),
    ),
    Family(
        name="person_description",
        kind="generation",
        held_out=True,
        draw=draw_person_description,
        templates=(
            "Introduce this person in a sentence: {record}",
            "Data: {record}\nIntroduction:",
            "Who is this? Answer with all the facts. {record}",
            "Turn the card into a sentence. {record}",
        ),
    ),
)
