"""The evaluation itself: every selector over the same pools, with paired intervals."""

from collections.abc import Iterable, Sequence

import numpy as np

from cappy.evaluation import (
    best_of_n,
    calibration,
    curve,
    examples,
    overlap,
    published,
    report,
    selectors,
    statistics,
    tables,
)
from cappy.evaluation.findings import Calibrated, Cost, Coverage
from cappy.evaluation.parts import Part, means_of, part_of, pools_of
from cappy.evaluation.pools import Pool, Score
from cappy.evaluation.rules import Rules
from cappy.progress import Progress, silent
from cappy.records import Instance, Split


def evaluate(
    instances: Iterable[Instance],
    *,
    score: Score | None,
    champion: Score | None = None,
    metric: str = "rougeL",
    split: Split = "test",
    seed: int = 0,
    probe: bool = True,
    progress: Progress = silent,
) -> report.Report:
    """Every selector on the instances of `split`; the validation split chooses hybrid weights and the best system.

    The instances of both splits are held in memory, those of other splits are not. RecordError where there is nothing
    to report on, or a candidate has no label.
    """
    pools, held_out, skipped = pools_of(instances, metric=metric, split=split)
    part = part_of(pools, held_out, score, champion, metric=metric, seed=seed, probe=probe, progress=progress)
    return report_of([part], metric=metric, split=split, seed=seed, skipped=skipped)


def report_of(
    parts: Sequence[Part], *, metric: str, split: str, seed: int, skipped: int = 0, folds: int = 0
) -> report.Report:
    """The report on all pools of the parts together."""
    pools = [pool for part in parts for pool in part.pools]
    found = _joined([part.rules for part in parts])
    means = means_of(pools, found.values)
    likelihood = max(
        (name for name in ("likelihood_sum", "likelihood_mean") if name in means.labels),
        key=lambda name: means.labels[name].mean(),
        default="",
    )
    compared = tables.pairs(means, likelihood)
    comparisons = {key: means.compare(*sides) for key, sides in compared.items()}
    curves = best_of_n.curves(pools, found, likelihood, seed=seed)
    tasks = tables.tasks(pools, means)
    return report.Report(
        metric=metric,
        split=split,
        seed=seed,
        facts=_facts(parts, pools, skipped),
        selectors=tables.rows(means, found, pools),
        unavailable=found.unavailable,
        comparisons=comparisons,
        adjusted=statistics.holm({key: value.p_value for key, value in comparisons.items()}),
        power={key: statistics.power(value) for key, value in comparisons.items()},
        curve=curves,
        pays_until=curve.pays_until([point.mean for point in curves["scorer"]]) if "scorer" in curves else 0,
        tasks=tasks,
        averages=tables.averages(tasks),
        published=published.beside(
            tasks,
            metric,
            tables.subject_of(means.labels),
            {pool.instance.task for pool in pools if pool.instance.template},
        ),
        examples=examples.drawn(pools, found, seed),
        worst=examples.worst(pools, found),
        calibration=_calibrated(parts),
        coverage=_coverage(pools, found),
        probes=tuple(parts[0].probes),
        cost=Cost(tokens=_tokens(pools)),
        better_likelihood=likelihood,
        folds=folds,
        tested_groups=overlap.sketch(pool.instance for pool in pools),
    )


def _joined(found: Sequence[Rules]) -> Rules:
    """The selectors that all parts have, one part's pools after another's; details of several parts are listed."""
    first = found[0]
    names = [name for name in first.values if all(name in own.values for own in found)]
    missing = {name: reason for own in found for name, reason in own.unavailable.items()}
    details = {}
    for name in first.details:
        if name in names:
            details[name] = ", ".join(dict.fromkeys(own.details.get(name, "") for own in found))
    return Rules(
        values={name: [value for own in found for value in own.values[name]] for name in names},
        details=details,
        unavailable=missing,
    )


def _calibrated(parts: Sequence[Part]) -> Calibrated | None:
    """Calibration of all reported picks, each by the map that was fitted beside its own scorer."""
    if any("scorer" not in part.rules.values for part in parts):
        return None
    return calibration.calibrated(
        [(calibration.picks(part.pools, part.rules.values["scorer"]), part.calibration) for part in parts]
    )


def _coverage(pools: Sequence[Pool], found: Rules) -> Coverage | None:
    if "scorer" not in found.values:
        return None
    values = found.values["scorer"]
    return calibration.coverage([float(own.max()) for own in values], selectors.picked(pools, values))


def _tokens(pools: Sequence[Pool]) -> float | None:
    """Mean tokens of a candidate; None where one was not counted."""
    counts = [candidate.num_tokens for pool in pools for candidate in pool.candidates]
    known = [count for count in counts if count is not None]
    return float(np.mean(known)) if known and len(known) == len(counts) else None


def _facts(parts: Sequence[Part], pools: Sequence[Pool], skipped: int) -> dict[str, int]:
    sizes = [len(pool.candidates) for pool in pools]
    return {
        "instances": len(pools),
        "groups": len({pool.instance.group_id for pool in pools}),
        "candidates": sum(sizes),
        "fewest_candidates": min(sizes),
        "most_candidates": max(sizes),
        "single_candidate_instances": sizes.count(1),
        "held_out_instances": sum(len(part.held_out) for part in parts),
        "skipped_instances": skipped,
        "mbr_curve_orders": curve.MBR_DRAWS,
    }
