"""Families that tell a record in prose: a restaurant, a person."""

from random import Random

from cappy.builtin.family import Content, Family
from cappy.builtin.vocabulary import (
    CATEGORIES,
    CITIES,
    COLOURS,
    NAMES,
    SURNAMES,
    THINGS,
    plural,
    with_article,
    words,
)

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
    """Name, food, price, area and perhaps a neighbour of a restaurant; three wordings are accepted."""
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
