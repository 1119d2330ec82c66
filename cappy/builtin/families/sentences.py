"""Families that rewrite a sentence: tense and negation, and the passive voice."""

from dataclasses import dataclass
from random import Random

from cappy.builtin.family import Content, Family
from cappy.builtin.vocabulary import ADJECTIVES, CATEGORIES, PERSON_ADJECTIVES, PLACES, THINGS, VERBS


@dataclass(frozen=True, slots=True, kw_only=True)
class Clause:
    """Somebody does something to something somewhere: noun phrases, the place with its preposition, a verb's forms."""

    subject: str
    verb: tuple[str, str, str, str]
    thing: str
    place: str

    def present(self) -> str:
        """The clause in the present tense."""
        return f"{self.subject} {self.verb[1]} {self.thing} {self.place}"

    def past(self) -> str:
        """The clause in the past tense."""
        return f"{self.subject} {self.verb[2]} {self.thing} {self.place}"


def draw_clause(rng: Random, *, num_adjectives: int | None = None) -> Clause:
    """A clause with none to two adjectives, as drawn or as asked for."""
    chance = rng.random()
    count = num_adjectives if num_adjectives is not None else (0 if chance < 0.2 else 1 if chance < 0.6 else 2)
    described = set(rng.sample(("person", "thing"), count))
    person, thing = rng.choice(CATEGORIES["jobs"]), rng.choice(THINGS)
    return Clause(
        subject=f"the {rng.choice(PERSON_ADJECTIVES)} {person}" if "person" in described else f"the {person}",
        verb=rng.choice(VERBS),
        thing=f"the {rng.choice(ADJECTIVES)} {thing}" if "thing" in described else f"the {thing}",
        place=f"{rng.choice(('in', 'near', 'behind'))} the {rng.choice(PLACES)}",
    )


def draw_tense_change(rng: Random) -> Content:
    """A sentence in the present, to be put in the past, the future or the negative, or made a question."""
    clause = draw_clause(rng)
    base = clause.verb[0]
    form, answer = rng.choice(
        (
            ("past tense", clause.past()),
            ("future tense", f"{clause.subject} will {base} {clause.thing} {clause.place}"),
            ("negative", f"{clause.subject} does not {base} {clause.thing} {clause.place}"),
            ("form of a question", f"does {clause.subject} {base} {clause.thing} {clause.place}?"),
        )
    )
    return Content(slots={"sentence": clause.present(), "form": form}, references=(answer,))


def draw_passive_voice(rng: Random) -> Content:
    """A sentence in the past, to be told from the side of the thing."""
    clause = draw_clause(rng)
    participle = clause.verb[3]
    return Content(
        slots={"sentence": clause.past()},
        references=(
            f"{clause.thing} was {participle} by {clause.subject} {clause.place}",
            f"{clause.thing} was {participle} {clause.place} by {clause.subject}",
        ),
    )


FAMILIES = (
    Family(
        name="tense_change",
        kind="generation",
        draw=draw_tense_change,
        templates=(
            "Rewrite the sentence in the {form}: {sentence}",
            "Sentence: {sentence}\nIn the {form}:",
            "How do you say this in the {form}? {sentence}",
            "Change to the {form}: {sentence}",
        ),
    ),
    Family(
        name="passive_voice",
        held_out=True,
        kind="generation",
        draw=draw_passive_voice,
        templates=(
            "Put into the passive voice: {sentence}",
            "Sentence: {sentence}\nPassive:",
            "Rewrite the sentence so that the thing comes first: {sentence}",
            "Turn this active sentence into a passive one. {sentence}",
        ),
    ),
)
