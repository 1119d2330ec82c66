"""Families that ask about a short passage: who has what, what came first, where something is, what follows."""

from random import Random

from cappy.builtin.family import Content, Family
from cappy.builtin.vocabulary import COLOURS, NAMES, PLACES, THINGS, listed, with_article, words

_DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")


def draw_passage_questions(rng: Random) -> Content:
    """Three people with two things each; the question is what one has, or who has something."""
    people = rng.sample(NAMES, 3)
    things = [f"{rng.choice(COLOURS)} {thing}" for thing in rng.sample(THINGS, 6)]
    owned = [[with_article(thing) for thing in things[start : start + 2]] for start in (0, 2, 4)]
    verbs = rng.sample(("has", "owns", "holds", "carries"), 3)
    sentences = [f"{who} {verb} {listed(what)}." for who, verb, what in zip(people, verbs, owned, strict=True)]
    asked = rng.randrange(3)
    thing = rng.choice(things[2 * asked : 2 * asked + 2])
    question, answer = rng.choice(
        (
            (f"What does {people[asked]} have?", listed(owned[asked])),
            (f"What does the owner of the {thing} have?", listed(owned[asked])),
            (f"Who has the {thing}?", f"{people[asked]} has the {thing}"),
        )
    )
    return Content(slots={"passage": " ".join(sentences), "question": question}, references=(answer,))


def draw_location_choice(rng: Random) -> Content:
    """Three things put somewhere and one of them moved; where is one of them now?"""
    things, places = rng.sample(THINGS, 3), rng.sample(PLACES, 4)
    people = rng.sample(NAMES, 4)
    sentences = [
        f"{who} put the {thing} in the {place}."
        for who, thing, place in zip(people, things, places[:3], strict=False)
    ]  # fmt: skip
    moved = rng.randrange(3)
    sentences.append(f"{people[3]} took the {things[moved]} to the {places[3]}.")
    asked = rng.randrange(3)
    answer = places[3] if asked == moved else places[asked]
    return Content(
        slots={"passage": " ".join(sentences), "thing": things[asked]},
        references=(f"in the {answer}",),
        choices=tuple(f"in the {place}" for place in sorted(places)),
    )


def draw_entailment(rng: Random) -> Content:
    """A premise and a statement that follows from it (yes), contradicts it (no), or does neither (maybe)."""
    name, other = rng.sample(NAMES, 2)
    colour, wrong_colour = rng.sample(COLOURS, 2)
    place, wrong_place = rng.sample(PLACES, 2)
    day, wrong_day = rng.sample(_DAYS, 2)
    thing, verb = rng.choice(THINGS), rng.choice(("bought", "found", "saw", "lost", "painted"))
    premise = f"{name} {verb} only {with_article(colour)} {thing} in the {place} on {day}."
    statement, answer = rng.choice(
        (
            (f"{name} {verb} {with_article(thing)}.", "yes"),
            (f"{name} {verb} something {colour}.", "yes"),
            (f"On {day} {name} was in the {place}.", "yes"),
            (f"{name} {verb} {with_article(wrong_colour)} {thing}.", "no"),
            (f"It was on {wrong_day} that {name} {verb} the {thing}.", "no"),
            (f"It was in the {wrong_place} that {name} {verb} the {thing}.", "no"),
            (f"{other} was in the {place} too.", "maybe"),
            (f"{name} {verb} the {thing} for {other}.", "maybe"),
            (f"The {thing} is {rng.choice(('heavy', 'old', 'small', 'broken'))}.", "maybe"),
        )
    )
    return Content(
        slots={"premise": premise, "statement": statement}, references=(answer,), choices=("yes", "no", "maybe")
    )


FAMILIES = (
    Family(
        name="passage_questions",
        kind="generation",
        draw=draw_passage_questions,
        templates=(
            "{passage} {question}",
            "Passage: {passage}\nQuestion: {question}",
            "Question: {question} Find the answer here: {passage}",
            "Read this and answer. {passage} {question} Answer:",
        ),
    ),
    Family(
        name="location_choice",
        kind="classification",
        held_out=True,
        draw=draw_location_choice,
        templates=(
            "{passage} Where is the {thing} now?",
            "Story: {passage}\nQuestion: where is the {thing}?",
            "Where would you look for the {thing}? {passage}",
            "{passage} In which place is the {thing} at the end?",
        ),
    ),
    Family(
        name="entailment",
        kind="classification",
        draw=draw_entailment,
        templates=(
            "{premise} Does it follow that the next sentence is true? {statement} Answer yes, no or maybe.",
            "Premise: {premise}\nHypothesis: {statement}\nyes, no or maybe?",
            "Suppose this: {premise} Is this true, then: {statement} (yes, no, maybe)",
            "Known: {premise} Claimed: {statement} Is the claim right (yes), wrong (no) or undecided (maybe)?",
        ),
    ),
)
