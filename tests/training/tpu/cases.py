"""Instances, settings and scorers that the tests of this folder share."""

import random
from collections.abc import Sequence

import torch

from cappy.config import build
from cappy.scoring import Scorer
from cappy.training.feed import Group
from cappy.training.finetuning import FinetuningConfig

WORDS = "cat dog bird mat tree blue red one two three".split()


def copy_groups(count: int, *, longest: int = 12, seed: int = 0) -> list[Group]:
    """The right response repeats the instruction's last word; instructions of 4 to `longest` words."""
    rng = random.Random(seed)
    groups = []
    for number in range(count):
        words = rng.choices(WORDS, k=rng.randint(4, longest))
        responses = tuple(dict.fromkeys([words[-1], *rng.sample(WORDS, rng.randint(2, 5))]))
        labels = tuple(1.0 if text == words[-1] else round(rng.random() / 2, 3) for text in responses)
        groups.append(Group(f"{number} {' '.join(words)}", responses, labels, (True,) * len(responses)))
    return groups


def plan(**values: object) -> FinetuningConfig:
    given = {"source": "a", "target": "b", "batch_instances": 8, "max_candidates": 6, "batch_tokens": 512, **values}
    return build(FinetuningConfig, given)


def without_dropout(scorer: Scorer) -> Scorer:
    """The scorer with every dropout at 0, in its configuration too."""
    for module in scorer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    config = scorer.model.config
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return scorer


def pairs_of(groups: Sequence[Group]) -> list[tuple[str, str]]:
    return [(group.instruction, response) for group in groups for response in group.responses]
