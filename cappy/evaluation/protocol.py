"""The evaluation itself: every selector over the same pools, with paired intervals."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from cappy.errors import RecordError
from cappy.evaluation import curve, report, selectors, statistics
from cappy.evaluation.pools import Pool, Score, Vector, collect, num_pairs, score_pools
from cappy.evaluation.rules import Rules, Values, rules
from cappy.progress import Progress, silent
from cappy.records import Instance, Split

COMPARISONS = (
    *(("scorer", other) for other in ("random", "first", "longest", "best_system", "likelihood", "mbr", "champion")),
    ("hybrid_mbr", "mbr"),
    ("hybrid_mbr", "scorer"),
    ("hybrid_likelihood", "scorer"),
    ("mbr", "random"),
    ("mbr", "likelihood"),
)
NUM_EXAMPLES = 10


def evaluate(
    instances: Iterable[Instance],
    *,
    score: Score | None,
    champion: Score | None = None,
    metric: str = "rougeL",
    split: Split = "test",
    seed: int = 0,
    resamples: int = 2000,
    progress: Progress = silent,
) -> report.Report:
    """Every selector on the instances of `split`; the validation split chooses hybrid weights and the best system.

    The instances of both splits are held in memory, those of other splits are not. RecordError where there is nothing
    to report on, or a candidate has no label.
    """
    collected = collect(instances, metric=metric, splits={split, "validation"})
    pools = [pool for pool in collected if pool.instance.split == split and pool.candidates]
    held_out = [pool for pool in collected if pool.instance.split == "validation" != split and pool.candidates]
    skipped = sum(pool.instance.split == split and not pool.candidates for pool in collected)
    if not pools:
        raise RecordError(_nothing(split, skipped))
    scores, held = _scored(pools, held_out, score, champion, progress)
    found = rules(pools, held_out, scores, held)
    labels = {"random": np.array([pool.labels.mean() for pool in pools])}
    labels |= {name: _picked(pools, values) for name, values in found.values.items()}
    labels = {name: labels[name] for name in report.SELECTORS if name in labels}
    likelihood = max(_likelihoods(labels), key=lambda name: labels[name].mean(), default="")
    samples = _resampled(labels, pools, resamples, seed)
    return report.Report(
        metric=metric,
        split=split,
        seed=seed,
        resamples=resamples,
        facts=_facts(pools, held_out, skipped),
        selectors=_rows(labels, samples, found, pools),
        unavailable=found.unavailable,
        comparisons=_comparisons(labels, samples, likelihood),
        curve=_curves(pools, found, likelihood, resamples, seed),
        tasks=_tasks(pools, labels, resamples, seed),
        averages=_averages(pools, labels),
        examples=_examples(pools, found, seed),
        better_likelihood=likelihood,
    )


def _nothing(split: str, skipped: int) -> str:
    if skipped:
        return f"all {skipped} {split} instances are without candidates to select from; run cappy sampling first"
    return f"no instance of split {split!r} to report on; prepare instances with that split"


def _scored(
    pools: Sequence[Pool], held_out: Sequence[Pool], score: Score | None, champion: Score | None, progress: Progress
) -> tuple[dict[str, Values], Values]:
    """The scores of scorer and champion on the reported pools, and the scorer's on the held-out ones."""
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
    return scores, held


def _picked(pools: Sequence[Pool], values: Values) -> Vector:
    rows = zip(pools, values, strict=True)
    return np.array([pool.labels[selectors.pick(value)] for pool, value in rows])


def _likelihoods(labels: Mapping[str, Vector]) -> list[str]:
    return [name for name in labels if name in ("likelihood_sum", "likelihood_mean")]


def _resampled(labels: Mapping[str, Vector], pools: Sequence[Pool], resamples: int, seed: int) -> dict[str, Vector]:
    """Selector -> its mean in every resample; the resamples are the same for all of them."""
    groups = [pool.instance.group_id for pool in pools]
    means = statistics.resampled_means(np.stack(list(labels.values()), axis=1), groups, resamples=resamples, seed=seed)
    return dict(zip(labels, means.T, strict=True))


def _compared(labels: Mapping[str, Vector], samples: Mapping[str, Vector], one: str, other: str) -> report.Difference:
    return statistics.compare(labels[one].mean(), labels[other].mean(), samples[one], samples[other])


def _rows(
    labels: Mapping[str, Vector], samples: Mapping[str, Vector], found: Rules, pools: Sequence[Pool]
) -> dict[str, report.Row]:
    def ties(name: str) -> int:
        values = found.values.get(name, ())
        return sum(selectors.is_tied(value, pool.labels) for pool, value in zip(pools, values, strict=False))

    return {
        name: report.Row(
            estimate=statistics.estimate(labels[name].mean(), samples[name]),
            gain=_compared(labels, samples, name, "random"),
            ties=ties(name),
            detail=found.details.get(name, ""),
        )
        for name in labels
    }


def _comparisons(
    labels: Mapping[str, Vector], samples: Mapping[str, Vector], likelihood: str
) -> dict[str, report.Difference]:
    named = {name: likelihood if name == "likelihood" else name for _, name in COMPARISONS}
    return {
        f"{one}-{other}": _compared(labels, samples, one, named[other])
        for one, other in COMPARISONS
        if one in labels and named[other] in labels
    }


def _curves(
    pools: Sequence[Pool], found: Rules, likelihood: str, resamples: int, seed: int
) -> dict[str, tuple[report.Estimate, ...]]:
    """Best-of-n for n from 1 to the largest pool."""
    curves = {"random": [np.full(1, pool.labels.mean()) for pool in pools]}
    for name in ("scorer", "champion", likelihood, "oracle"):
        if name in found.values:
            rows = zip(pools, found.values[name], strict=True)
            curves[name] = [curve.ranked_curve(values, pool.labels) for pool, values in rows]
    if "mbr" in found.values:
        rng = np.random.default_rng(seed)
        curves["mbr"] = [curve.mbr_curve(pool.responses, pool.labels, rng) for pool in pools]
    size = max(len(pool.candidates) for pool in pools)
    groups = [pool.instance.group_id for pool in pools]
    estimates = {}
    for name, each in curves.items():
        values = np.stack([curve.extended(row, size) for row in each])
        samples = statistics.resampled_means(values, groups, resamples=resamples, seed=seed)
        columns = zip(values.mean(axis=0), samples.T, strict=True)
        estimates[name] = tuple(statistics.estimate(mean, column) for mean, column in columns)
    return estimates


def _tasks(
    pools: Sequence[Pool], labels: Mapping[str, Vector], resamples: int, seed: int
) -> tuple[report.TaskRow, ...]:
    subject = next(name for name in ("scorer", "mbr", "first") if name in labels)
    rows = []
    for task, where in _grouped([pool.instance.task for pool in pools]).items():
        own = [pools[index] for index in where]
        part = {name: values[where] for name, values in labels.items()}
        is_choice = all(pool.is_choice for pool in own)
        templates = _grouped([pool.instance.template for pool in own]) if is_choice else {}
        rows.append(
            report.TaskRow(
                task=task,
                kind="choice" if is_choice else "generation",
                instances=len(own),
                means={name: float(values.mean()) for name, values in part.items()},
                gain=_compared(part, _resampled(part, own, resamples, seed), subject, "random"),
                templates={name: float(part[subject][index].mean()) for name, index in templates.items()},
            )
        )
    return tuple(rows)


def _averages(pools: Sequence[Pool], labels: Mapping[str, Vector]) -> dict[str, dict[str, float]]:
    """Unweighted means over tasks; CrowS-Pairs can carry an average alone, so there is one without it."""
    tasks = _grouped([pool.instance.task for pool in pools])
    kept = {task: where for task, where in tasks.items() if "crows" not in task.casefold()}
    sets = {"all tasks": tasks, "without CrowS-Pairs": kept if len(kept) < len(tasks) else {}}
    return {
        title: {
            name: float(np.mean([values[where].mean() for where in of.values()])) for name, values in labels.items()
        }
        for title, of in sets.items()
        if len(of) > 1
    }


def _grouped(names: Sequence[str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        groups.setdefault(name, []).append(index)
    return dict(sorted(groups.items()))


def _examples(pools: Sequence[Pool], found: Rules, seed: int) -> tuple[report.Example, ...]:
    drawn = np.sort(np.random.default_rng(seed).permutation(len(pools))[:NUM_EXAMPLES])
    shown = [name for name in ("first", "mbr", "scorer", "oracle") if name in found.values]
    examples = []
    for index in drawn:
        pool = pools[index]
        best = {name: selectors.pick(found.values[name][index]) for name in shown}
        picks = (
            report.Pick(selector=n, response=pool.responses[i], label=float(pool.labels[i])) for n, i in best.items()
        )
        instance = pool.instance
        examples.append(
            report.Example(
                instance_id=instance.instance_id,
                task=instance.task,
                instruction=instance.instruction,
                references=instance.references,
                picks=tuple(picks),
            )
        )
    return tuple(examples)


def _facts(pools: Sequence[Pool], held_out: Sequence[Pool], skipped: int) -> dict[str, int]:
    sizes = [len(pool.candidates) for pool in pools]
    return {
        "instances": len(pools),
        "groups": len({pool.instance.group_id for pool in pools}),
        "candidates": sum(sizes),
        "fewest_candidates": min(sizes),
        "most_candidates": max(sizes),
        "held_out_instances": len(held_out),
        "skipped_instances": skipped,
        "mbr_curve_orders": curve.MBR_DRAWS,
    }
