"""Families about lists of words: order, reverse, select, count, filter, oppose."""

from itertools import chain
from random import Random

from cappy.builtin.family import Content, Family
from cappy.builtin.vocabulary import CATEGORIES, THINGS

_NOUNS = tuple(chain(THINGS, *CATEGORIES.values()))
_COUNTABLE = tuple(
    noun
    for category in ("animals", "instruments", "vehicles", "jobs")
    for noun in CATEGORIES[category]
) + THINGS  # fmt: skip
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
    """Three to five different nouns, to be read from the end."""
    words = rng.sample(_NOUNS, rng.randint(3, 5))
    return Content(slots={"words": ", ".join(words)}, references=(", ".join(reversed(words)),))


def draw_list_selection(rng: Random) -> Content:
    """Four to six different nouns, of which a part is wanted, in the same order."""
    words = rng.sample(_NOUNS, rng.randint(4, 6))
    part = rng.choice(tuple(_SELECTIONS))
    return Content(slots={"words": ", ".join(words), "part": part}, references=(", ".join(words[_SELECTIONS[part]]),))


def draw_category_filtering(rng: Random) -> Content:
    """Five or six nouns of several categories; the two or three of the category that is asked for are wanted."""
    wanted, *others = rng.sample(tuple(CATEGORIES), 3)
    members = rng.sample(CATEGORIES[wanted], rng.randint(2, 3))
    rest = rng.sample(tuple(chain.from_iterable(CATEGORIES[other] for other in others)), 3)
    words = [*members, *rest]
    rng.shuffle(words)
    answer = ", ".join(word for word in words if word in members)
    return Content(slots={"words": ", ".join(words), "category": wanted}, references=(answer,))


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
)
