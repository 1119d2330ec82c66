"""The parts of the report: means, comparisons, curves, tasks, examples, and probes of the scorer.

Each probe is one number. The probes measure how scores depend on the instruction, on length, on the template, and on
order and batch.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypedDict

import numpy as np

from cappy.evaluation import statistics
from cappy.evaluation.findings import (
    Average,
    Difference,
    Example,
    MeanEstimate,
    Pick,
    Probe,
    PublishedTask,
    RatedCandidate,
    TableRow,
    TaskRow,
)
from cappy.pages import percent
from cappy.selection.curves import extend_curve
from cappy.selection.pools import Pool, PoolVectors, ScoreFunction, Vector, is_tied, pick, pick_labels
from cappy.selection.selectors import SELECTORS, Selection, compared_pairs

PUBLISHED = Path(__file__).with_name("data") / "published.json"
NUM_EXAMPLES = 10
NUM_CANDIDATES = 12
"""Maximum number of candidates that an example shows: the picks, then those with the highest scores."""


@dataclass(frozen=True, kw_only=True)
class PickLabels:
    """The labels of each selector's picks, shape (pools,), in the order of a report; and the group of each pool."""

    labels: Mapping[str, Vector]
    groups: Sequence[str]

    def compare(self, first: str, second: str) -> Difference:
        """The paired difference of two selectors."""
        return statistics.compare(self.labels[first], self.labels[second], self.groups)

    def estimates(self) -> dict[str, MeanEstimate]:
        """Selector -> its mean label with its interval."""
        stacked = np.stack(list(self.labels.values()), axis=1)
        return dict(zip(self.labels, statistics.estimate_means(stacked, self.groups), strict=True))


def compute_pick_labels(pools: Sequence[Pool], values: Mapping[str, PoolVectors]) -> PickLabels:
    """Computes the labels of the selectors' picks on these pools."""
    labels = {name: pick_labels(pools, values[name]) for name in SELECTORS if name in values}
    return PickLabels(labels=labels, groups=[pool.instance.group_id for pool in pools])


def choose_best_variants(picked: PickLabels) -> dict[str, str]:
    """Kind of selector -> its variant with the best mean label.

    That mean is optimistic, because the variant is chosen on these same pools.
    """
    best_variants: dict[str, str] = {}
    for name in picked.labels:
        key = SELECTORS[name].variant_of
        if key and (key not in best_variants or picked.labels[name].mean() > picked.labels[best_variants[key]].mean()):
            best_variants[key] = name
    return best_variants


def build_rows(picked: PickLabels, selection: Selection, pools: Sequence[Pool]) -> dict[str, TableRow]:
    """One row per selector; ties are reported as 0 for the bounds (random choice, oracle)."""

    def ties(name: str) -> int:
        pairs = zip(pools, selection.values[name], strict=True)
        return 0 if SELECTORS[name].bound else sum(is_tied(value, pool.labels) for pool, value in pairs)

    return {
        name: TableRow(
            estimate=estimate,
            gain=picked.compare(name, "random"),
            ties=ties(name),
            detail=selection.details.get(name, ""),
        )
        for name, estimate in picked.estimates().items()
    }


def compare_selectors(picked: PickLabels, best_variants: Mapping[str, str]) -> dict[str, Difference]:
    """The paired differences of a report, by the key "first-second"."""
    pairs = [(first, second, best_variants.get(second, second)) for first, second in compared_pairs()]
    return {
        f"{first}-{second}": picked.compare(first, variant)
        for first, second, variant in pairs
        if first in picked.labels and variant in picked.labels
    }


def build_curves(
    pools: Sequence[Pool], selection: Selection, best_variants: Mapping[str, str], *, seed: int
) -> dict[str, tuple[MeanEstimate, ...]]:
    """Selector -> expected label of its pick among n candidates, for n from 1.

    An instance with fewer than n candidates counts with all of them.
    """
    size = max(len(pool.candidates) for pool in pools)
    groups = [pool.instance.group_id for pool in pools]
    by_selector = {}
    for name, pool_curves in selection.curves.items():
        if best_variants.get(SELECTORS[name].variant_of, name) != name:
            continue
        generator = np.random.default_rng(seed)
        curves = [curve(generator) for curve in pool_curves]
        by_selector[name] = tuple(
            statistics.estimate_means(np.stack([extend_curve(curve, size) for curve in curves]), groups)
        )
    return by_selector


def build_task_rows(pools: Sequence[Pool], picked: PickLabels) -> tuple[TaskRow, ...]:
    """One row per task, in alphabetical order."""
    subject = choose_subject(picked.labels)
    table = []
    for task, indices in _indices_by_name([pool.instance.task for pool in pools]).items():
        task_pools = [pools[index] for index in indices]
        labels = {name: values[indices] for name, values in picked.labels.items()}
        part = PickLabels(labels=labels, groups=[pool.instance.group_id for pool in task_pools])
        is_choice = all(pool.is_choice for pool in task_pools)
        templates = _indices_by_name([pool.instance.template for pool in task_pools]) if is_choice else {}
        table.append(
            TaskRow(
                task=task,
                kind="choice" if is_choice else "generation",
                instances=len(task_pools),
                means={name: float(values.mean()) for name, values in labels.items()},
                gain=part.compare(subject, "random"),
                templates={name: float(labels[subject][index].mean()) for name, index in templates.items()},
                against_champion=part.compare("selector", "champion")
                if {"selector", "champion"} <= {*labels}
                else None,
            )
        )
    return tuple(table)


def average_tasks(table: Sequence[TaskRow]) -> dict[str, Average]:
    """Unweighted means over tasks; CrowS-Pairs can dominate an average, so there is also one without it.

    Intervals are over tasks: they generalise to other tasks of the same kind.
    """
    without_crows = [row for row in table if "crows" not in row.task.casefold()]
    sets = {"all tasks": table, "without CrowS-Pairs": without_crows if len(without_crows) < len(table) else ()}
    return {name: _average_rows(rows) for name, rows in sets.items() if len(rows) > 1}


def choose_subject(labels: Mapping[str, Vector]) -> str:
    """The selector that a report is about: the fitted one, else MBR, else the first response."""
    return next(name for name in ("selector", "mbr", "first") if name in labels)


def compare_with_published(
    tasks: Sequence[TaskRow], metric: str, subject: str, tasks_with_template: Collection[str]
) -> tuple[PublishedTask, ...]:
    """The tasks that have the same name, kind and metric as a published task, with the published numbers.

    BIG-bench's prompts have no template, so a generation task in `tasks_with_template` is a different task that has the
    same name.
    """
    rows = []
    for collection in _read_published().values():
        for row in tasks:
            same = row.kind == collection["kind"] and collection["metric"] in ("", metric)
            same = same and (row.kind == "choice" or row.task not in tasks_with_template)
            if same and row.task in collection["tasks"]:
                numbers = collection["tasks"][row.task]
                ours = 100 * row.means[subject]
                rows.append(PublishedTask(task=row.task, ours=ours, numbers=numbers, source=collection["source"]))
    return tuple(rows)


def draw_examples(pools: Sequence[Pool], selection: Selection, seed: int) -> tuple[Example, ...]:
    """Draws at most `NUM_EXAMPLES` instances at random, as examples."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(pools))[:NUM_EXAMPLES])
    return tuple(_build_examples(chosen, pools, selection))


def find_worst_examples(pools: Sequence[Pool], selection: Selection) -> tuple[Example, ...]:
    """The instances where the selector's pick is furthest below the best candidate, largest difference first."""
    if "selector" not in selection.values:
        return ()
    best = np.array([pool.labels.max() for pool in pools])
    losses = best - pick_labels(pools, selection.values["selector"])
    order = np.argsort(-losses, kind="stable")[:NUM_EXAMPLES]
    return tuple(_build_examples([index for index in order if losses[index] > 0], pools, selection))


class _PublishedCollection(TypedDict):
    """Published tasks of one kind and metric; the metric is "" if all metrics are equivalent."""

    kind: str
    metric: str
    source: str
    tasks: dict[str, dict[str, float]]


@cache
def _read_published() -> dict[str, _PublishedCollection]:
    values: dict[str, _PublishedCollection] = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    return values


def _average_rows(table: Sequence[TaskRow]) -> Average:
    labels = {name: np.array([row.means[name] for row in table]) for name in table[0].means}
    picked = PickLabels(labels=labels, groups=[row.task for row in table])
    return Average(tasks=len(table), means=picked.estimates(), gain=picked.compare(choose_subject(labels), "random"))


def _indices_by_name(names: Sequence[str]) -> dict[str, list[int]]:
    """Name -> its indices, names in alphabetical order."""
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        groups.setdefault(name, []).append(index)
    return dict(sorted(groups.items()))


def _build_examples(indices: Iterable[int], pools: Sequence[Pool], selection: Selection) -> Iterator[Example]:
    shown = [name for name in selection.values if "examples" in SELECTORS[name].shown_in]
    for index in indices:
        pool = pools[index]
        values = {name: selection.values[name][index] for name in shown}
        picked_positions = {name: pick(value) for name, value in values.items()}
        order = np.argsort(-values.get("selector", pool.labels), kind="stable")
        # The picks are shown even if other candidates have higher values.
        listed = set(
            list(dict.fromkeys([*picked_positions.values(), *(int(position) for position in order)]))[:NUM_CANDIDATES]
        )
        candidates = (
            RatedCandidate(
                response=pool.responses[position],
                label=float(pool.labels[position]),
                value=float(values["selector"][position]) if "selector" in values else None,
                score=float(values["scorer"][position]) if "scorer" in values else None,
                mbr=float(values["mbr"][position]) if "mbr" in values else None,
            )
            for position in order
            if position in listed
        )
        yield Example(
            instance_id=pool.instance.instance_id,
            task=pool.instance.task,
            instruction=pool.instance.instruction,
            references=pool.instance.references,
            picks=tuple(
                Pick(selector=name, response=pool.responses[position], label=float(pool.labels[position]))
                for name, position in picked_positions.items()
            ),
            candidates=tuple(candidates),
            left_out=len(pool.candidates) - len(listed),
        )


NUM_BLANKED_INSTANCES = 200
NUM_REPEATED_PAIRS = 32
BLANK = " "
"""The text that replaces an instruction."""


def run_probes(
    pools: Sequence[Pool], scores: PoolVectors, score: ScoreFunction, tasks: Sequence[TaskRow], seed: int
) -> list[Probe]:
    """Runs the probes that are possible on these pools."""
    sample = np.sort(np.random.default_rng(seed).permutation(len(pools))[:NUM_BLANKED_INSTANCES])
    results = [
        _probe_response_only([pools[index] for index in sample], [scores[index] for index in sample], score),
        _probe_length(pools, scores),
        *_probe_templates(tasks),
        _probe_order(pools, scores, score),
    ]
    return [probe for probe in results if probe is not None]


def _probe_response_only(pools: Sequence[Pool], scores: PoolVectors, score: ScoreFunction) -> Probe | None:
    """The share of the gain over random choice that remains when the instruction is blanked."""
    pairs = [[(BLANK, response) for response in pool.responses] for pool in pools]
    flat = iter(score([pair for pool_pairs in pairs for pair in pool_pairs]))
    scores_without = [np.array([next(flat) for _ in pool_pairs]) for pool_pairs in pairs]
    random, with_instruction, without_instruction = (
        float(np.mean(values))
        for values in (
            [pool.labels.mean() for pool in pools],
            pick_labels(pools, scores),
            pick_labels(pools, scores_without),
        )
    )
    if with_instruction - random < 1e-3:
        return None
    remaining = (without_instruction - random) / (with_instruction - random)
    share = f"{100 * remaining:.0f}%" if remaining > 0 else "none"
    return Probe(
        name="response only",
        value=remaining,
        meaning=f"With the instruction blanked, the scorer's picks have a mean label of {percent(without_instruction)} "
        f"instead of {percent(with_instruction)} (random choice {percent(random)}): {share} of its gain comes from "
        "the response alone.",
    )


def _probe_length(pools: Sequence[Pool], scores: PoolVectors) -> Probe | None:
    """The correlation of scores with length within a pool, minus that of labels."""
    lengths = [np.array([len(response) for response in pool.responses], dtype=np.float64) for pool in pools]
    scored, labelled = correlation(scores, lengths), correlation([pool.labels for pool in pools], lengths)
    if scored is None or labelled is None:
        return None
    bias = "prefers longer responses than" if scored > labelled else "prefers shorter responses than"
    verb = bias if abs(scored - labelled) > 0.1 else "favours length as much as"
    return Probe(
        name="length",
        value=scored - labelled,
        meaning=f"Within a pool, length has a correlation of {scored:+.2f} with scores and {labelled:+.2f} with "
        f"labels: the scorer {verb} the labels do.",
    )


def _probe_templates(tasks: Sequence[TaskRow]) -> Iterator[Probe]:
    """Standard deviation of a task's accuracy over its templates, averaged over tasks."""
    spreads = [float(np.std(list(row.templates.values()))) for row in tasks if len(row.templates) > 1]
    if spreads:
        mean = float(np.mean(spreads))
        yield Probe(
            name="template",
            value=mean,
            meaning=f"The accuracy varies by {percent(mean)} over the templates of one task (standard deviation, mean "
            f"of {len(spreads)} tasks): expect as much for your own prompt.",
        )


def _probe_order(pools: Sequence[Pool], scores: PoolVectors, score: ScoreFunction) -> Probe:
    """The largest change of a score when pairs are scored in another order and batch."""
    pairs = {
        (pool.instance.instruction, response): value
        for pool, values in zip(pools, scores, strict=True)
        for response, value in zip(pool.responses, values, strict=True)
    }
    step = max(1, len(pairs) // NUM_REPEATED_PAIRS)
    sample = dict(list(pairs.items())[::step][:NUM_REPEATED_PAIRS])
    again = [
        *zip(reversed(sample), score(list(reversed(sample))), strict=True),
        *((pair, score([pair])[0]) for pair in sample),
    ]
    largest = float(max(abs(value - pairs[pair]) for pair, value in again))
    return Probe(
        name="order and batch",
        value=largest,
        meaning=f"The scores of {len(sample)} pairs change by at most {largest:.1g} in another order or one by one.",
    )


def correlation(first: Sequence[Vector], second: Sequence[Vector]) -> float | None:
    """Pearson's correlation, -1 to 1, of deviations from the pool's mean; None if one of the two does not vary."""
    x, y = (np.concatenate([values - values.mean() for values in pools]) for pools in (first, second))
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 1e-12 else None
