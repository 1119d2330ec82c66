"""Instances to evaluate, small and seeded."""

import random
from collections.abc import Callable

import pytest

from cappy.annotation import rouge_l
from cappy.records import Candidate, Instance

SENTENCE = "the quick brown fox jumps over a lazy dog near river bank while cats watch from old stone wall"
WORDS = SENTENCE.split()


@pytest.fixture
def make_instance() -> Callable[..., Instance]:
    """An instance with candidates that are noisy copies of its reference, labelled by Rouge-L."""

    def make(index: int, *, split: str = "test", size: int = 6, task: str = "copy") -> Instance:
        rng = random.Random(index)
        words = rng.sample(WORDS, 9)
        reference = " ".join(words)
        candidates = []
        for position in range(size):
            noisy = [word if rng.random() < 0.7 else rng.choice(WORDS) for word in words]
            text = " ".join(noisy[: rng.randint(5, 9)])
            candidates.append(
                Candidate(
                    response=text,
                    generator="small" if position % 2 else "large",
                    logprob_sum=-rng.random() * 10,
                    logprob_mean=-rng.random(),
                    labels={"rougeL": rouge_l([reference], text)},
                )
            )
        return Instance(
            instance_id=f"{split}-{index}",
            instruction=f"Write down sentence {index}",
            references=(reference,),
            split=split,  # type: ignore[arg-type]
            task=task,
            candidates=tuple(candidates),
        )

    return make


@pytest.fixture
def instances(make_instance: Callable[..., Instance]) -> list[Instance]:
    """40 test and 20 validation instances."""
    test = [make_instance(index) for index in range(40)]
    return test + [make_instance(index, split="validation") for index in range(100, 120)]


@pytest.fixture
def score(instances: list[Instance]) -> Callable[..., list[float]]:
    """A scorer that knows the labels, but not well."""
    labels = {(i.instruction, c.response): c.labels["rougeL"] for i in instances for c in i.candidates}
    return lambda pairs: [0.5 * labels.get(pair, 0.0) + 0.3 * random.Random(pair[1]).random() for pair in pairs]
