"""The evaluation protocol: scores pools of candidates and compares all selectors on the same pools."""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np

from cappy.errors import ConfigError, RecordError
from cappy.evaluation import calibration, statistics, tables
from cappy.evaluation.findings import CalibrationResult, Coverage, Probe, ScoringCost
from cappy.evaluation.report import Report
from cappy.progress import Progress, silent
from cappy.records import Instance, Split
from cappy.records.folder import write_bytes
from cappy.records.overlap import sketch
from cappy.scoring.calibration import Calibration
from cappy.selection.curves import NUM_ORDERS, num_worthwhile_candidates
from cappy.selection.fitting import fit_selector, out_of_fold_selectors
from cappy.selection.linear import Evidence, Selector
from cappy.selection.pools import Pool, ScoreFunction, Vector, collect_pools, count_pairs, score_pools, with_scores
from cappy.selection.selectors import Fitting, Selection, select


class AnyScorer(Protocol):
    """The part of a scorer that an evaluation uses."""

    @property
    def version(self) -> str:
        """Identifies the weights."""

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """The scores of (instruction, response) pairs, in order."""


@dataclass(frozen=True, kw_only=True)
class EvaluatedSplit:
    """The reported pools of one scorer with its scores, and what was fitted on pools that are not reported.

    `held_out_selectors` has the selector that picks from each held-out pool, for the calibration and thresholds.
    An evaluation has one such split, a cross-fitted evaluation has one for each fold.
    """

    pools: Sequence[Pool]
    held_out: Sequence[Pool]
    selection: Selection
    selector: Selector
    held_out_selectors: Sequence[Selector]
    calibration: Calibration | None
    probes: Sequence[Probe] = ()


@dataclass(frozen=True, kw_only=True)
class ScoredSplit:
    """The reported and the held-out pools of one scorer with its scores, and its probes."""

    pools: Sequence[Pool]
    held_out: Sequence[Pool]
    probes: Sequence[Probe] = ()


def split_pools(instances: Iterable[Instance], *, metric: str, split: Split) -> tuple[list[Pool], list[Pool], int]:
    """Returns the reported pools, the held-out pools, and the number of instances of `split` without candidates.

    Raises RecordError if no pool of `split` has several candidates, or if a candidate has no label of this metric.
    """
    collected = collect_pools(instances, metric=metric, splits={split, "validation"})
    pools = [pool for pool in collected if pool.instance.split == split and pool.candidates]
    held_out = [pool for pool in collected if pool.instance.split == "validation" != split and pool.candidates]
    skipped = sum(pool.instance.split == split and not pool.candidates for pool in collected)
    if not pools and skipped:
        raise RecordError(
            f"none of the {skipped} {split} instances has candidates to select from; run cappy sampling first"
        )
    if not pools:
        raise RecordError(f"there are no instances of split {split!r} to report on; prepare instances with that split")
    if all(len(pool.candidates) == 1 for pool in pools):
        raise RecordError(
            f"every {split} instance has a single candidate, so there is nothing to select; sample more of them "
            "(cappy sampling --strategy)"
        )
    return pools, held_out, skipped


def score_split(
    pools: Sequence[Pool],
    held_out: Sequence[Pool],
    score: ScoreFunction | None,
    others: Mapping[str, ScoreFunction] = MappingProxyType({}),
    *,
    seed: int,
    with_probes: bool = True,
    progress: Progress = silent,
) -> ScoredSplit:
    """Scores the reported and the held-out pools; `others`, such as the champion, score only the reported ones.

    Raises ConfigError if all scores of a scorer are equal, except of the initial one: a new head may do that.
    """
    total = (count_pairs(pools) + count_pairs(held_out)) * (score is not None) + count_pairs(pools) * len(others)
    done = 0

    def count_scored(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total, unit="pairs")

    if score is not None:
        held_out = with_scores(held_out, "scorer", score_pools(held_out, score, count_scored))
        pools = with_scores(pools, "scorer", score_pools(pools, score, count_scored))
    for name, score_other in others.items():
        pools = with_scores(pools, name, score_pools(pools, score_other, count_scored))
    for name in pools[0].scores:
        if name != "initial":
            _check_not_constant(name, pools)
    probes: list[Probe] = []
    if score is not None and with_probes:
        scores = get_scorer_scores(pools)
        # The probes are about the scorer, so its picks stand for the selector's.
        picked = tables.compute_pick_labels(
            pools, {"random": [np.zeros(len(pool.labels)) for pool in pools], "selector": scores}
        )
        probes = tables.run_probes(pools, scores, score, tables.build_task_rows(pools, picked), seed)
    return ScoredSplit(pools=pools, held_out=held_out, probes=probes)


def select_split(
    scored: ScoredSplit,
    *,
    metric: str,
    seed: int,
    fit_on: Sequence[Pool] | None = None,
    evidence: Evidence = "held-out",
    scorer: str = "",
    selector: Selector | None = None,
    champion: Selector | None = None,
) -> EvaluatedSplit:
    """Fits the selectors on the pools `fit_on`, by default the held-out ones, and applies them to the reported pools.

    The calibration is fitted on the picks of the held-out pools. `scorer` is the version of the scorer, `selector` its
    selector if it has one already, and `champion` that of the champion.
    """
    fit_on = scored.held_out if fit_on is None else fit_on
    has_scorer = "scorer" in scored.pools[0].scores
    held_out_selectors: Sequence[Selector] = ()
    if selector is not None:
        held_out_selectors = [selector] * len(scored.held_out)
    elif has_scorer:
        selector = fit_selector(fit_on, metric=metric, evidence=evidence, scorer=scorer)
        held_out_selectors = _held_out_selectors(scored.held_out, fit_on, selector, metric=metric, evidence=evidence)
    else:
        selector = Selector(scorer=scorer)
    fitting = Fitting(held_out=fit_on, pools=scored.pools, selector=selector, champion=champion or Selector())
    return EvaluatedSplit(
        pools=scored.pools,
        held_out=scored.held_out,
        selection=select(fitting),
        selector=selector,
        held_out_selectors=held_out_selectors,
        calibration=calibration.fit(scored.held_out, held_out_selectors, metric, seed=seed)
        if held_out_selectors
        else None,
        probes=scored.probes,
    )


def _held_out_selectors(
    held_out: Sequence[Pool], fit_on: Sequence[Pool], selector: Selector, *, metric: str, evidence: Evidence
) -> Sequence[Selector]:
    """For each held-out pool, a selector that was not fitted on it: its picks would look better than those of others.

    It is `selector`, fitted on `fit_on`, if there are too few groups for another one.
    """
    if fit_on is held_out:
        return out_of_fold_selectors(held_out, metric=metric) or [selector] * len(held_out)
    groups = {pool.instance.group_id for pool in held_out}
    others = [pool for pool in fit_on if pool.instance.group_id not in groups]
    fitted = selector if len(others) == len(fit_on) else fit_selector(others, metric=metric, evidence=evidence)
    return [fitted] * len(held_out)


def mark_unavailable(evaluated: EvaluatedSplit, name: str, reason: str) -> EvaluatedSplit:
    """The split with the reason why a selector is unavailable."""
    unavailable = {**evaluated.selection.unavailable, name: reason}
    return replace(evaluated, selection=replace(evaluated.selection, unavailable=unavailable))


def get_scorer_scores(pools: Sequence[Pool]) -> list[Vector]:
    """The scorer's scores of the candidates of every pool."""
    return [pool.scores["scorer"] for pool in pools]


def build_report(
    evaluated_splits: Sequence[EvaluatedSplit], *, metric: str, split: str, seed: int, skipped: int = 0, folds: int = 0
) -> Report:
    """Builds the report on the pools of all splits together."""
    pools = [pool for part in evaluated_splits for pool in part.pools]
    selection = _join_selections([part.selection for part in evaluated_splits])
    picked = tables.compute_pick_labels(pools, selection.values)
    best_variants = tables.choose_best_variants(picked)
    comparisons = tables.compare_selectors(picked, best_variants)
    curves = tables.build_curves(pools, selection, best_variants, seed=seed)
    subject_curve = [point.mean for point in curves.get("selector", ())]
    num_worthwhile = num_worthwhile_candidates(subject_curve) if subject_curve else 0
    tasks = tables.build_task_rows(pools, picked)
    return Report(
        metric=metric,
        split=split,
        seed=seed,
        facts=_count_facts(evaluated_splits, pools, skipped),
        selectors=tables.build_rows(picked, selection, pools),
        unavailable=selection.unavailable,
        comparisons=comparisons,
        adjusted=statistics.adjust_p_values({key: value.p_value for key, value in comparisons.items()}),
        power={key: statistics.compute_power(value) for key, value in comparisons.items()},
        curve=curves,
        num_worthwhile_candidates=num_worthwhile,
        tasks=tasks,
        averages=tables.average_tasks(tasks),
        published=tables.compare_with_published(
            tasks,
            metric,
            tables.choose_subject(picked.labels),
            {pool.instance.task for pool in pools if pool.instance.template},
        ),
        examples=tables.draw_examples(pools, selection, seed),
        worst=tables.find_worst_examples(pools, selection),
        calibration=_measure_calibration(evaluated_splits),
        coverage=_measure_coverage(pools, selection),
        probes=tuple(evaluated_splits[0].probes),
        cost=ScoringCost(tokens=_mean_tokens(pools)),
        better_likelihood_selector=best_variants.get("likelihood", ""),
        folds=folds,
        tested_groups=sketch(pool.instance for pool in pools),
    )


def cached_scores(score: ScoreFunction, folder: Path, name: str) -> ScoreFunction:
    """Wraps `score` so that the result of each call is stored in a hidden file of the work folder and then reused.

    The file also records the duration of the call in seconds.
    """

    def score_or_read(pairs: Sequence[tuple[str, str]]) -> list[float]:
        key = hashlib.sha256(json.dumps(list(pairs)).encode()).hexdigest()[:16]
        path = folder / f".{name}-{key}.json"
        if not path.is_file():
            started = time.monotonic()
            values = [float(value) for value in score(pairs)]
            result = {"scores": values, "seconds": time.monotonic() - started}
            write_bytes(path, json.dumps(result).encode())
        stored: list[float] = json.loads(path.read_text())["scores"]
        return stored

    return score_or_read


def seconds_per_pair(folder: Path) -> float | None:
    """Mean seconds per pair of the calls that `cached_scores` stored; None if there are none.

    Only calls with 100 pairs or more count, if there are any.
    """
    paths = [path for pattern in (".challenger-*.json", ".fold-*.json") for path in sorted(folder.glob(pattern))]
    calls = [json.loads(path.read_text()) for path in paths]
    large = [call for call in calls if len(call["scores"]) >= 100] or calls
    pairs = sum(len(call["scores"]) for call in large)
    return sum(call["seconds"] for call in large) / pairs if pairs else None


def _join_selections(selections: Sequence[Selection]) -> Selection:
    """Concatenates the values of the selectors that are available in all splits, and joins their details."""
    first = selections[0]
    names = [name for name in first.values if all(name in selection.values for selection in selections)]
    unavailable = {name: reason for selection in selections for name, reason in selection.unavailable.items()}
    details = {}
    for name in first.details:
        if name in names:
            details[name] = ", ".join(dict.fromkeys(selection.details.get(name, "") for selection in selections))
    return Selection(
        values={name: [value for selection in selections for value in selection.values[name]] for name in names},
        details=details,
        unavailable=unavailable,
        curves={
            name: [curve for selection in selections for curve in selection.curves[name]]
            for name in first.curves
            if name in names and all(name in selection.curves for selection in selections)
        },
    )


def _measure_calibration(evaluated_splits: Sequence[EvaluatedSplit]) -> CalibrationResult | None:
    """Measures the calibration of all reported picks; each split uses the calibration of its own scorer."""
    if any("selector" not in part.selection.values for part in evaluated_splits):
        return None
    return calibration.measure_calibration(
        [
            (calibration.collect_picks(part.pools, part.selection.values["selector"]), part.calibration)
            for part in evaluated_splits
        ]
    )


def _measure_coverage(pools: Sequence[Pool], selection: Selection) -> Coverage | None:
    if "selector" not in selection.values:
        return None
    picks = calibration.collect_picks(pools, selection.values["selector"])
    return calibration.measure_coverage(picks.scores.tolist(), picks.labels)


def _mean_tokens(pools: Sequence[Pool]) -> float | None:
    """Mean number of tokens per candidate; None if any is unknown."""
    counts = [candidate.num_tokens for pool in pools for candidate in pool.candidates]
    known = [count for count in counts if count is not None]
    return float(np.mean(known)) if known and len(known) == len(counts) else None


def _count_facts(evaluated_splits: Sequence[EvaluatedSplit], pools: Sequence[Pool], skipped: int) -> dict[str, int]:
    sizes = [len(pool.candidates) for pool in pools]
    return {
        "instances": len(pools),
        "groups": len({pool.instance.group_id for pool in pools}),
        "candidates": sum(sizes),
        "fewest_candidates": min(sizes),
        "most_candidates": max(sizes),
        "single_candidate_instances": sizes.count(1),
        "held_out_instances": sum(len(part.held_out) for part in evaluated_splits),
        "skipped_instances": skipped,
        "curve_orders": NUM_ORDERS,
    }


def _check_not_constant(name: str, pools: Sequence[Pool]) -> None:
    values = np.concatenate([pool.scores[name] for pool in pools])
    if len(values) > 1 and values.max() == values.min():
        raise ConfigError(
            f"the {name} gave the same score, {values[0]:.6g}, to all {len(values)} candidates; train it again"
        )
