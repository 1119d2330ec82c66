"""Responses that are wrong on purpose: the references of other instances.

Both recipes draw among the instances given, which in the step are those of one part.
"""

import random
from collections.abc import Callable, Hashable, Iterable, Sequence

from cappy.annotation.rouge import rouge_l_pools
from cappy.records import Instance

NEARLY_RIGHT = 0.5
"""Rouge-L against the instance's own references from which a mismatch is no wrong response."""
SPARE_DRAWS = 4
"""Draws beyond those asked for, in case that some are nearly right."""


def unlike(instances: Sequence[Instance], own: Sequence[set[str]], *, count: int, seed: int) -> list[list[str]]:
    """For each instance up to `count` different references of others of its task and template.

    None is among its `own` texts, and none reaches `NEARLY_RIGHT`. An instance with choices gets none: its wrong
    choices are there already.
    """
    pools = _pools(instances, lambda instance: (instance.task, instance.template))
    drawn: list[list[str]] = []
    for instance, texts in zip(instances, own, strict=True):
        pool = pools[instance.task, instance.template]
        wanted = 0 if instance.choices else min(len(pool), count and count + SPARE_DRAWS)
        picks = random.Random(f"{seed} {instance.instance_id}").sample(pool, wanted)
        drawn.append([text for text in picks if text not in texts])
    values = iter(rouge_l_pools([instance.references for instance in instances], drawn).tolist())
    return [[text for text in texts if next(values) < NEARLY_RIGHT][:count] for texts in drawn]


def published(instances: Sequence[Instance], *, seed: int) -> list[list[str]]:
    """As the published code draws: for each reference one of all references of the task, right or wrong.

    One that is already a text of the instance is dropped and not drawn again (cappy_bigbench.py:31-37).
    """
    pools = _pools(instances, lambda instance: instance.task)
    drawn = []
    for instance in instances:
        rng = random.Random(f"{seed} {instance.instance_id}")
        pool = pools[instance.task]
        picks = [] if instance.choices else [rng.choice(pool) for _ in instance.references]
        drawn.append([text for text in dict.fromkeys(picks) if text not in instance.references])
    return drawn


def _pools(instances: Iterable[Instance], key: Callable[[Instance], Hashable]) -> dict[Hashable, list[str]]:
    """The different references of the instances of each key, in order."""
    pools: dict[Hashable, dict[str, None]] = {}
    for instance in instances:
        pools.setdefault(key(instance), {}).update(dict.fromkeys(filter(str.strip, instance.references)))
    return {name: list(texts) for name, texts in pools.items()}
