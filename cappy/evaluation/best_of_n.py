"""Best of n with intervals: what every selector is worth when n candidates are sampled, for n from 1 to all."""

from collections.abc import Sequence

import numpy as np

from cappy.evaluation import curve, statistics
from cappy.evaluation.findings import Estimate
from cappy.evaluation.pools import Pool
from cappy.evaluation.rules import Rules


def curves(pools: Sequence[Pool], found: Rules, likelihood: str, *, seed: int) -> dict[str, tuple[Estimate, ...]]:
    """Selector -> its expected label by n; instances with fewer candidates keep the result of all they have."""
    each = {"random": [np.full(1, pool.labels.mean()) for pool in pools]}
    for name in ("scorer", "champion", likelihood, "oracle"):
        if name in found.values:
            rows = zip(pools, found.values[name], strict=True)
            each[name] = [curve.ranked_curve(values, pool.labels) for pool, values in rows]
    if "mbr" in found.values:
        rng = np.random.default_rng(seed)
        each["mbr"] = [curve.mbr_curve(pool.responses, pool.labels, rng) for pool in pools]
    size = max(len(pool.candidates) for pool in pools)
    groups = [pool.instance.group_id for pool in pools]
    estimates = {}
    for name, own in each.items():
        values = np.stack([curve.extended(row, size) for row in own])
        estimates[name] = tuple(statistics.estimates(values, groups))
    return estimates
