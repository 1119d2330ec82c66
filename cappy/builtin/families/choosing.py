"""Families that choose among given answers: sentiment, odd one out, comparison, topic."""

from random import Random

from cappy.builtin.family import Content, Family
from cappy.builtin.vocabulary import CATEGORIES, CITIES, NAMES, THINGS, TOPICS, plural, words

_GOOD = words("""
    amazing beautiful brilliant charming comfortable delicious delightful excellent fantastic friendly great helpful
    impressive lovely outstanding perfect pleasant superb terrific wonderful
""")
_BAD = words("""
    annoying awful boring broken confusing dirty disappointing disgusting dreadful horrible noisy poor rude shabby
    slow terrible ugly unfriendly useless worthless
""")
_ASPECTS = words("""
    acting atmosphere bar bathroom bed beer bread breakfast camera cast coffee design dessert dinner director ending
    food garden guide lighting location lunch manager menu music owner packaging parking pool price quality queue
    reception room screen script seat service soup sound staff story taxi tea tour view waiter wine
""")


def draw_sentiment(rng: Random) -> Content:
    """A review of three aspects: all good, all bad, or both. A good word may be said as `not` a bad one."""
    answer = rng.choice(("positive", "negative", "mixed"))
    good = rng.sample((True, True, False) if rng.random() < 0.5 else (True, False, False), 3)
    verdicts = good if answer == "mixed" else [answer == "positive"] * 3
    clauses = [
        f"the {aspect} was {_opinion(rng, verdict)}"
        for aspect, verdict in zip(rng.sample(_ASPECTS, 3), verdicts, strict=True)
    ]
    review = f"In {rng.choice(CITIES)} {clauses[0]}, {clauses[1]} and {clauses[2]}."
    return Content(slots={"review": review}, references=(answer,), choices=("positive", "negative", "mixed"))


def _opinion(rng: Random, good: bool) -> str:
    if rng.random() < 0.25:
        return f"not {rng.choice(_BAD if good else _GOOD)}"
    return rng.choice(_GOOD if good else _BAD)


def draw_odd_one_out(rng: Random) -> Content:
    """Three nouns of one category and one of another, which is the answer."""
    category, other = rng.sample(tuple(CATEGORIES), 2)
    odd = rng.choice(CATEGORIES[other])
    words = [*rng.sample(CATEGORIES[category], 3), odd]
    rng.shuffle(words)
    return Content(slots={"words": ", ".join(words)}, references=(odd,), choices=tuple(words))


def draw_comparison(rng: Random) -> Content:
    """Two people with different numbers of something; who has more, or fewer?"""
    people = rng.sample(NAMES, 2)
    top = rng.choice((20, 100, 1_000))
    numbers = rng.sample(range(2, top), 2)
    which = rng.choice(("more", "fewer"))
    answer = people[numbers.index(max(numbers) if which == "more" else min(numbers))]
    things = plural(rng.choice(THINGS))
    return Content(
        slots={
            "facts": f"{people[0]} has {numbers[0]} {things} and {people[1]} has {numbers[1]}.",
            "which": which,
        },
        references=(answer,),
        choices=tuple(people),
    )


def draw_topic(rng: Random) -> Content:
    """A sentence with three words of one topic and one of another, and four topics to choose from."""
    topics = rng.sample(tuple(TOPICS), 4)
    topic, distraction = topics[0], topics[1]
    words = [*rng.sample(TOPICS[topic], 3), rng.choice([w for w in TOPICS[distraction] if w not in TOPICS[topic]])]
    rng.shuffle(words)
    speaker = f"{rng.choice(NAMES)} from {rng.choice(CITIES)}"
    sentence = f"{speaker} spoke about the {words[0]}, the {words[1]}, the {words[2]} and the {words[3]}."
    rng.shuffle(topics)
    return Content(
        slots={"sentence": sentence, "topics": ", ".join(topics)}, references=(topic,), choices=tuple(topics)
    )


FAMILIES = (
    Family(
        name="sentiment",
        kind="classification",
        draw=draw_sentiment,
        templates=(
            "Review: {review} Is it positive, negative or mixed?",
            "{review} What does the guest feel: positive, negative or mixed?",
            "Classify this opinion as positive, negative or mixed. {review}",
            "How satisfied was the writer (positive, negative, mixed)? {review}",
        ),
    ),
    Family(
        name="odd_one_out",
        kind="classification",
        draw=draw_odd_one_out,
        templates=(
            "Which word does not belong with the others? {words}",
            "Find the odd one out: {words}",
            "Three of these are of one kind. Name the fourth. {words}",
            "{words}: one of them is different. Which?",
        ),
    ),
    Family(
        name="comparison",
        kind="classification",
        draw=draw_comparison,
        templates=(
            "{facts} Who has {which}?",
            "Facts: {facts}\nQuestion: which of the two has {which}?",
            "Name the one who has {which}. {facts}",
            "Compare. {facts} The one with {which} is",
        ),
    ),
    Family(
        name="topic",
        kind="classification",
        draw=draw_topic,
        templates=(
            "{sentence} What was it mainly about: {topics}?",
            "Topics: {topics}\nText: {sentence}\nBest topic:",
            "Choose a heading from {topics} for this report. {sentence}",
            "Is this news of {topics}? {sentence}",
        ),
    ),
)
