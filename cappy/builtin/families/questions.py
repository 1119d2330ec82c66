"""Families that ask a question about a short passage or with given choices."""

from random import Random

from cappy.builtin.families import Content, Family
from cappy.builtin.vocabulary import (
    CATEGORIES,
    CITIES,
    COLOURS,
    NAMES,
    PLACES,
    THINGS,
    TOPICS,
    join_phrases,
    plural,
    with_article,
    words,
)

_DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")


def draw_passage_questions(rng: Random) -> Content:
    """Three people with two things each; the question asks what one of them has, or who has a thing."""
    people = rng.sample(NAMES, 3)
    things = [f"{rng.choice(COLOURS)} {thing}" for thing in rng.sample(THINGS, 6)]
    owned = [[with_article(thing) for thing in things[start : start + 2]] for start in (0, 2, 4)]
    verbs = rng.sample(("has", "owns", "holds", "carries"), 3)
    sentences = [f"{who} {verb} {join_phrases(what)}." for who, verb, what in zip(people, verbs, owned, strict=True)]
    index = rng.randrange(3)
    thing = rng.choice(things[2 * index : 2 * index + 2])
    question, answer = rng.choice(
        (
            (f"What does {people[index]} have?", join_phrases(owned[index])),
            (f"What does the owner of the {thing} have?", join_phrases(owned[index])),
            (f"Who has the {thing}?", f"{people[index]} has the {thing}"),
        )
    )
    return Content(slots={"passage": " ".join(sentences), "question": question}, references=(answer,))


def draw_location_choice(rng: Random) -> Content:
    """Three things are put somewhere and one of them is moved; the question asks where one of them is."""
    things, places = rng.sample(THINGS, 3), rng.sample(PLACES, 4)
    people = rng.sample(NAMES, 4)
    sentences = [
        f"{who} put the {thing} in the {place}."
        for who, thing, place in zip(people, things, places[:3], strict=False)
    ]  # fmt: skip
    moved = rng.randrange(3)
    sentences.append(f"{people[3]} took the {things[moved]} to the {places[3]}.")
    index = rng.randrange(3)
    answer = places[3] if index == moved else places[index]
    return Content(
        slots={"passage": " ".join(sentences), "thing": things[index]},
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
    """A review of three aspects: all good, all bad, or mixed; "not" with a bad word may replace a good word."""
    answer = rng.choice(("positive", "negative", "mixed"))
    mixed_verdicts = rng.sample((True, True, False) if rng.random() < 0.5 else (True, False, False), 3)
    verdicts = mixed_verdicts if answer == "mixed" else [answer == "positive"] * 3
    clauses = [
        f"the {aspect} was {_opinion(rng, verdict)}"
        for aspect, verdict in zip(rng.sample(_ASPECTS, 3), verdicts, strict=True)
    ]
    review = f"In {rng.choice(CITIES)} {clauses[0]}, {clauses[1]} and {clauses[2]}."
    return Content(slots={"review": review}, references=(answer,), choices=("positive", "negative", "mixed"))


def _opinion(rng: Random, is_good: bool) -> str:
    if rng.random() < 0.25:
        return f"not {rng.choice(_BAD if is_good else _GOOD)}"
    return rng.choice(_GOOD if is_good else _BAD)


def draw_odd_one_out(rng: Random) -> Content:
    """Three nouns of one category and one of another, which is the answer."""
    category, other = rng.sample(tuple(CATEGORIES), 2)
    odd = rng.choice(CATEGORIES[other])
    words = [*rng.sample(CATEGORIES[category], 3), odd]
    rng.shuffle(words)
    return Content(slots={"words": ", ".join(words)}, references=(odd,), choices=tuple(words))


def draw_comparison(rng: Random) -> Content:
    """Two people with different numbers of something; the question asks who has more, or fewer."""
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
    topic, other_topic = topics[0], topics[1]
    words = [*rng.sample(TOPICS[topic], 3), rng.choice([w for w in TOPICS[other_topic] if w not in TOPICS[topic]])]
    rng.shuffle(words)
    speaker = f"{rng.choice(NAMES)} from {rng.choice(CITIES)}"
    sentence = f"{speaker} spoke about the {words[0]}, the {words[1]}, the {words[2]} and the {words[3]}."
    rng.shuffle(topics)
    return Content(
        slots={"sentence": sentence, "topics": ", ".join(topics)}, references=(topic,), choices=tuple(topics)
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
