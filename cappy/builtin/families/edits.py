"""Families about the words of one sentence: edit it, or put its shuffled words back in order."""

from random import Random

from cappy.builtin.families.sentences import draw_clause
from cappy.builtin.family import Content, Family
from cappy.builtin.vocabulary import ADJECTIVES, COLOURS, THINGS

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


FAMILIES = (
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
)
