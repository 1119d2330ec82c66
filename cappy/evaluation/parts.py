"""Parts: pools with what every selector says of them, and what was chosen on held-out ones."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cappy.errors import ConfigError, RecordError
from cappy.evaluation import calibration, report, robustness, selectors, tables
from cappy.evaluation.findings import Probe
from cappy.evaluation.pools import Pool, Score, Vector, collect, num_pairs, score_pools
from cappy.evaluation.rules import Rules, Values, rules
from cappy.progress import Progress, silent
from cappy.records import Instance, Split
from cappy.scoring.calibration import Calibration


@dataclass(frozen=True, kw_only=True)
class Part:
    """Pools that one scorer is reported on, what was chosen on the held-out ones, and the calibration fitted there.

    An evaluation has one part, a cross-fitted one has a part for each fold.
    """

    pools: Sequence[Pool]
    held_out: Sequence[Pool]
    held_scores: Values
    rules: Rules
    calibration: Calibration | None
    probes: Sequence[Probe] = ()


def pools_of(instances: Iterable[Instance], *, metric: str, split: Split) -> tuple[list[Pool], list[Pool], int]:
    """The reported pools, the held-out ones, and how many instances of `split` have no candidate to select."""
    collected = collect(instances, metric=metric, splits={split, "validation"})
    pools = [pool for pool in collected if pool.instance.split == split and pool.candidates]
    held_out = [pool for pool in collected if pool.instance.split == "validation" != split and pool.candidates]
    skipped = sum(pool.instance.split == split and not pool.candidates for pool in collected)
    if not pools and skipped:
        raise RecordError(
            f"all {skipped} {split} instances are without candidates to select from; run cappy sampling first"
        )
    if not pools:
        raise RecordError(f"no instance of split {split!r} to report on; prepare instances with that split")
    if all(len(pool.candidates) == 1 for pool in pools):
        raise RecordError(
            f"every {split} instance has a single candidate, so there is nothing to select; sample more of them "
            "(cappy sampling --strategy)"
        )
    return pools, held_out, skipped


def part_of(
    pools: Sequence[Pool],
    held_out: Sequence[Pool],
    score: Score | None,
    champion: Score | None = None,
    *,
    metric: str,
    seed: int,
    probe: bool = True,
    progress: Progress = silent,
) -> Part:
    """Scores the pools, and the held-out ones by the scorer alone, and finds all selectors' values."""
    total = (num_pairs(pools) + num_pairs(held_out)) * (score is not None) + num_pairs(pools) * (champion is not None)
    done = 0

    def told(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total, unit="pairs")

    scores: dict[str, Values] = {}
    held: Values = []
    if score is not None:
        held = score_pools(held_out, score, told)
        scores["scorer"] = score_pools(pools, score, told)
    if champion is not None:
        scores["champion"] = score_pools(pools, champion, told)
    for name, values in scores.items():
        _refuse_constant(name, values)
    fitted = calibration.fit(held_out, held, metric) if held else None
    probes: list[Probe] = []
    if score is not None and probe:
        table = tables.tasks(pools, means_of(pools, {"scorer": scores["scorer"]}))
        probes = robustness.probes(pools, scores["scorer"], score, table, seed)
    found = rules(pools, held_out, scores, held)
    return Part(pools=pools, held_out=held_out, held_scores=held, rules=found, calibration=fitted, probes=probes)


def means_of(pools: Sequence[Pool], values: Mapping[str, Values]) -> tables.Means:
    """The selectors' labels by pool, in the order of a report."""
    labels = {"random": np.array([pool.labels.mean() for pool in pools])}
    labels |= {name: selectors.picked(pools, own) for name, own in values.items()}
    ordered = {name: labels[name] for name in report.SELECTORS if name in labels}
    return tables.Means(labels=ordered, groups=[pool.instance.group_id for pool in pools])


def _refuse_constant(name: str, values: Values) -> None:
    found = flat(values)
    if len(found) > 1 and found.max() == found.min():
        raise ConfigError(
            f"the {name} gave {found[0]:.6g} to all {len(found)} candidates, so it tells none apart; train it again"
        )


def flat(values: Values) -> Vector:
    """The values of all pools in a row."""
    return np.concatenate([np.asarray(value, dtype=np.float64) for value in values]) if len(values) else np.empty(0)
