"""What is chosen on held-out instances, never on the reported ones: hybrid weights, the best single system."""

from collections.abc import Collection, Sequence

import numpy as np

from cappy.evaluation import selectors
from cappy.evaluation.pools import Pool, Vector

WEIGHTS = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""The weights that a hybrid may have: 0 is the scorer alone."""


def choose_weight(scores: Sequence[Vector], others: Sequence[Vector], labels: Sequence[Vector]) -> float:
    """The weight of `WEIGHTS` whose hybrid has the best mean label, the smallest of equally good ones."""

    def mean_label(weight: float) -> float:
        rows = zip(scores, others, labels, strict=True)
        return float(np.mean([selectors.pick_label(selectors.hybrid(s, o, weight), label) for s, o, label in rows]))

    return max(WEIGHTS, key=mean_label)


def choose_system(pools: Sequence[Pool], among: Collection[str] | None = None) -> str | None:
    """The generator and decoding whose first candidate has the best mean label; None where no candidate names one.

    `among` are the only ones to choose from, where given.
    """
    names = dict.fromkeys(selectors.system_of(candidate) for pool in pools for candidate in pool.candidates)
    names.pop("", None)
    if among is not None:
        names = {name: None for name in names if name in among}

    def mean_label(name: str) -> float:
        return float(selectors.picked(pools, [selectors.system(pool.candidates, name) for pool in pools]).mean())

    return max(names, key=mean_label, default=None)
