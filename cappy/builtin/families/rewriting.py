"""Families that reorder or rewrite given words: lists, sentences, tense and voice."""

from dataclasses import dataclass
from itertools import chain
from random import Random

from cappy.builtin.families import Content, Family
from cappy.builtin.vocabulary import ADJECTIVES, CATEGORIES, COLOURS, PERSON_ADJECTIVES, PLACES, THINGS, VERBS

_NOUNS = tuple(chain(THINGS, *CATEGORIES.values()))
_SELECTIONS = {
    "the first two words": slice(0, 2),
    "the first three words": slice(0, 3),
    "the last two words": slice(-2, None),
    "the last three words": slice(-3, None),
    "every second word": slice(1, None, 2),
    "all but the first word": slice(1, None),
    "all but the last word": slice(0, -1),
    "everything between the first and the last word": slice(1, -1),
}


def draw_word_sorting(rng: Random) -> Content:
    """Three to five different nouns, to be put in alphabetical order."""
    words = rng.sample(_NOUNS, rng.randint(3, 5))
    return Content(slots={"words": " ".join(words)}, references=(" ".join(sorted(words)),))


def draw_list_reversal(rng: Random) -> Content:
    """Three to five different nouns, to be reversed."""
    words = rng.sample(_NOUNS, rng.randint(3, 5))
    return Content(slots={"words": ", ".join(words)}, references=(", ".join(reversed(words)),))


def draw_list_selection(rng: Random) -> Content:
    """Four to six different nouns; a part of them is to be copied in the same order."""
    words = rng.sample(_NOUNS, rng.randint(4, 6))
    part = rng.choice(tuple(_SELECTIONS))
    return Content(slots={"words": ", ".join(words), "part": part}, references=(", ".join(words[_SELECTIONS[part]]),))


def draw_category_filtering(rng: Random) -> Content:
    """Five or six nouns of three categories; those of one category are to be selected."""
    target, *others = rng.sample(tuple(CATEGORIES), 3)
    members = rng.sample(CATEGORIES[target], rng.randint(2, 3))
    rest = rng.sample(tuple(chain.from_iterable(CATEGORIES[other] for other in others)), 3)
    words = [*members, *rest]
    rng.shuffle(words)
    answer = ", ".join(word for word in words if word in members)
    return Content(slots={"words": ", ".join(words), "category": target}, references=(answer,))


_REPLACEMENTS = tuple(dict.fromkeys(ADJECTIVES + COLOURS + THINGS))


def draw_word_editing(rng: Random) -> Content:
    """A sentence, and one change to be made to its words."""
    words = draw_clause(rng).past().split()
    position = rng.choice([index for index, word in enumerate(words) if words.count(word) == 1])
    word, new = words[position], rng.choice([option for option in _REPLACEMENTS if option not in words])
    before, after = words[:position], words[position + 1 :]
    edit, changed = rng.choice(
        (
            (f"replace {word} with {new}", [*before, new, *after]),
            (f"remove the word {word}", [*before, *after]),
            (f"insert {new} before {word}", [*before, new, word, *after]),
            (f"insert {new} after {word}", [*before, word, new, *after]),
            (f"stop after the word {word}", [*before, word]),
        )
    )
    return Content(slots={"sentence": " ".join(words), "edit": edit}, references=(" ".join(changed),))


@dataclass(frozen=True, slots=True, kw_only=True)
class Clause:
    """Subject, verb, object and place (with its preposition) of a clause.

    `verb` has four forms: base form, third person singular, past tense and past participle.
    """

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
    """A random clause with zero to two adjectives, or with `num_adjectives`."""
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
    """A sentence in the past tense, to be put into the passive voice."""
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
        name="word_sorting",
        kind="generation",
        draw=draw_word_sorting,
        templates=(
            "Sort these words alphabetically: {words}",
            "Put the words in alphabetical order. Words: {words}",
            "List: {words}\nWhat is the list in alphabetical order?",
            "How would a dictionary order these words? {words}",
            "Arrange from A to Z: {words}",
        ),
    ),
    Family(
        name="list_reversal",
        kind="generation",
        draw=draw_list_reversal,
        templates=(
            "Reverse this list: {words}",
            "Write the list from the last word to the first. List: {words}",
            "Read backwards, word by word: {words}",
            "Here is a list: {words}. Give it in the opposite order.",
        ),
    ),
    Family(
        name="list_selection",
        kind="generation",
        draw=draw_list_selection,
        templates=(
            "From the list {words}, give {part}.",
            "List: {words}\nCopy {part}.",
            "I need {part} of this list: {words}",
            "What is {part} here? {words}",
        ),
    ),
    Family(
        name="category_filtering",
        kind="generation",
        draw=draw_category_filtering,
        templates=(
            "Which of these words are {category}? {words}",
            "Keep only the {category}: {words}",
            "Words: {words}\nName all the {category} among them.",
            "From {words}, pick out the {category}.",
        ),
    ),
    Family(
        name="word_editing",
        kind="generation",
        draw=draw_word_editing,
        templates=(
            "Sentence: {sentence}\nEdit: {edit}",
            "In the sentence [{sentence}], {edit}.",
            "Take this sentence and {edit}: {sentence}",
            "Here is a sentence: {sentence}. Please {edit} and write it again.",
            "What is left of [{sentence}] when you {edit}?",
        ),
    ),
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
