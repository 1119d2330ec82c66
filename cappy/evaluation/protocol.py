"""The evaluation itself: every selector over the same pools, with paired intervals."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cappy.errors import ConfigError, RecordError
from cappy.evaluation import (
    best_of_n,
    calibration,
    curve,
    examples,
    published,
    report,
    robustness,
    selectors,
    statistics,
    tables,
)
from cappy.evaluation.findings import Calibrated, Cost, Coverage, Probe
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


def evaluate(
    instances: Iterable[Instance],
    *,
    score: Score | None,
    champion: Score | None = None,
    metric: str = "rougeL",
    split: Split = "test",
    seed: int = 0,
    resamples: int = 2000,
    probe: bool = True,
    progress: Progress = silent,
) -> report.Report:
    """Every selector on the instances of `split`; the validation split chooses hybrid weights and the best system.

    The instances of both splits are held in memory, those of other splits are not. RecordError where there is nothing
    to report on, or a candidate has no label.
    """
    pools, held_out, skipped = pools_of(instances, metric=metric, split=split)
    part = part_of(pools, held_out, score, champion, metric=metric, seed=seed, probe=probe, progress=progress)
    return report_of([part], metric=metric, split=split, seed=seed, resamples=resamples, skipped=skipped)


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
    fitted = calibration.fit(_flat(held), _flat([pool.labels for pool in held_out]), metric) if held else None
    probes: list[Probe] = []
    if score is not None and probe:
        table = tables.tasks(pools, _means(pools, {"scorer": scores["scorer"]}, 1, seed), resamples=1, seed=seed)
        probes = robustness.probes(pools, scores["scorer"], score, table, seed)
    found = rules(pools, held_out, scores, held)
    return Part(pools=pools, held_out=held_out, held_scores=held, rules=found, calibration=fitted, probes=probes)


def report_of(
    parts: Sequence[Part], *, metric: str, split: str, seed: int, resamples: int, skipped: int = 0, folds: int = 0
) -> report.Report:
    """The report on all pools of the parts together."""
    pools = [pool for part in parts for pool in part.pools]
    found = _joined([part.rules for part in parts])
    means = _means(pools, found.values, resamples, seed)
    likelihood = max(
        (name for name in ("likelihood_sum", "likelihood_mean") if name in means.labels),
        key=lambda name: means.labels[name].mean(),
        default="",
    )
    compared = tables.pairs(means, likelihood)
    comparisons = {key: means.compare(*sides) for key, sides in compared.items()}
    curves = best_of_n.curves(pools, found, likelihood, resamples=resamples, seed=seed)
    tasks = tables.tasks(pools, means, resamples=resamples, seed=seed)
    return report.Report(
        metric=metric,
        split=split,
        seed=seed,
        resamples=resamples,
        facts=_facts(parts, pools, skipped),
        selectors=tables.rows(means, found, pools),
        unavailable=found.unavailable,
        comparisons=comparisons,
        adjusted=statistics.holm({key: statistics.p_value(value, resamples) for key, value in comparisons.items()}),
        power={key: means.power(*sides) for key, sides in compared.items()},
        curve=curves,
        pays_until=curve.pays_until([point.mean for point in curves["scorer"]]) if "scorer" in curves else 0,
        tasks=tasks,
        averages=tables.averages(tasks, resamples=resamples, seed=seed),
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
        probes=_mean_probes([part.probes for part in parts]),
        cost=Cost(tokens=_tokens(pools)),
        better_likelihood=likelihood,
        folds=folds,
    )


def _refuse_constant(name: str, values: Values) -> None:
    flat = _flat(values)
    if len(flat) > 1 and flat.max() - flat.min() == 0.0:
        raise ConfigError(
            f"the {name} gave {flat[0]:.6g} to all {len(flat)} candidates, so it tells none apart; train it again"
        )


def _means(pools: Sequence[Pool], values: Mapping[str, Values], resamples: int, seed: int) -> tables.Means:
    """The selectors' labels by pool, in the order of a report."""
    labels = {"random": np.array([pool.labels.mean() for pool in pools])}
    for name, own in values.items():
        rows = zip(pools, own, strict=True)
        labels[name] = np.array([pool.labels[selectors.pick(value)] for pool, value in rows])
    ordered = {name: labels[name] for name in report.SELECTORS if name in labels}
    return tables.means(ordered, [pool.instance.group_id for pool in pools], resamples=resamples, seed=seed)


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
    """Calibration over all reported candidates, each by the map that was fitted beside its own scorer."""
    if any("scorer" not in part.rules.values for part in parts):
        return None
    raw = _flat([value for part in parts for value in part.rules.values["scorer"]])
    labels = _flat([pool.labels for part in parts for pool in part.pools])
    maps = [part.calibration for part in parts]
    mapped = None
    if all(own is not None for own in maps):
        mapped = np.array(
            [
                value
                for part, own in zip(parts, maps, strict=True)
                if own is not None
                for value in own.apply(_flat(part.rules.values["scorer"]).tolist())
            ]
        )
    return calibration.calibrated(raw, mapped, labels, sum(own.fitted_on for own in maps if own is not None))


def _coverage(pools: Sequence[Pool], found: Rules) -> Coverage | None:
    if "scorer" not in found.values:
        return None
    values = found.values["scorer"]
    labels = np.array([pool.labels[selectors.pick(own)] for pool, own in zip(pools, values, strict=True)])
    return calibration.coverage([float(own.max()) for own in values], labels)


def _mean_probes(parts: Sequence[Sequence[Probe]]) -> tuple[Probe, ...]:
    """The first part's probes: a cross-fitted report says of one of its scorers how it reads."""
    return tuple(parts[0]) if parts else ()


def _tokens(pools: Sequence[Pool]) -> float | None:
    """Mean tokens of a candidate; None where one was not counted."""
    counts = [candidate.num_tokens for pool in pools for candidate in pool.candidates]
    known = [count for count in counts if count is not None]
    return float(np.mean(known)) if known and len(known) == len(counts) else None


def _flat(values: Values) -> Vector:
    return np.concatenate([np.asarray(value, dtype=np.float64) for value in values]) if len(values) else np.empty(0)


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
