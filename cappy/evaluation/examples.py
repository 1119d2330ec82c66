"""Instances to look at: some drawn at random, so that nobody chose them, and those where the scorer lost most."""

from collections.abc import Iterable, Sequence

import numpy as np

from cappy.evaluation import selectors
from cappy.evaluation.findings import Example, Pick, Rated
from cappy.evaluation.pools import Pool
from cappy.evaluation.rules import Rules

NUM_EXAMPLES = 10
NUM_CANDIDATES = 12
"""Candidates of an example that are shown: the picks, then the highest scores."""
SHOWN = ("first", "mbr", "scorer", "oracle")


def drawn(pools: Sequence[Pool], rules: Rules, seed: int) -> tuple[Example, ...]:
    """Instances at random."""
    return tuple(_examples(np.sort(np.random.default_rng(seed).permutation(len(pools))[:NUM_EXAMPLES]), pools, rules))


def worst(pools: Sequence[Pool], rules: Rules) -> tuple[Example, ...]:
    """The instances where the scorer's pick is furthest below the best candidate, the furthest first."""
    if "scorer" not in rules.values:
        return ()
    best = np.array([pool.labels.max() for pool in pools])
    lost = best - selectors.picked(pools, rules.values["scorer"])
    order = np.argsort(-lost, kind="stable")[:NUM_EXAMPLES]
    return tuple(_examples([index for index in order if lost[index] > 0], pools, rules))


def _examples(indexes: Iterable[int], pools: Sequence[Pool], rules: Rules) -> Iterable[Example]:
    for index in indexes:
        pool = pools[index]
        values = {name: rules.values[name][index] for name in SHOWN if name in rules.values}
        best = {name: selectors.pick(value) for name, value in values.items()}
        order = np.argsort(-values.get("scorer", pool.labels), kind="stable")
        # What was picked stands in the list however long the pool is.
        kept = set(list(dict.fromkeys([*best.values(), *(int(place) for place in order)]))[:NUM_CANDIDATES])
        candidates = (
            Rated(
                response=pool.responses[place],
                label=float(pool.labels[place]),
                score=float(values["scorer"][place]) if "scorer" in values else None,
                mbr=float(values["mbr"][place]) if "mbr" in values else None,
            )
            for place in order
            if place in kept
        )
        instance = pool.instance
        yield Example(
            instance_id=instance.instance_id,
            task=instance.task,
            instruction=instance.instruction,
            references=instance.references,
            picks=tuple(
                Pick(selector=name, response=pool.responses[place], label=float(pool.labels[place]))
                for name, place in best.items()
            ),
            candidates=tuple(candidates),
            left_out=len(pool.candidates) - len(kept),
        )
