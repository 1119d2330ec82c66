"""The preview of a run: its graph, the resources of each step, the maximum cost, and an estimate of its sampling."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cappy.config import fingerprint, to_values
from cappy.progress import duration
from cappy.records.folder import write_bytes
from cappy.runs import StepRecord
from cappy.specs import parse_spec
from cappy.steps import STEP_SPECS
from cappy.worker import StepConfig
from pipelines.customize import image
from pipelines.planning import work_of
from pipelines.recipe import Platform, Recipe

if TYPE_CHECKING:
    from cappy.preparation.rows import SourceRow
    from cappy.preparation.step import PreparationConfig
    from cappy.records import Instance
    from cappy.sampling.estimate import Estimate

CONDITION = "(if promoted)"
MAX_PAIR_TOKENS = 512
"""Tokens of a pair that are assumed at most: longer ones are truncated."""
MEASURED_STEPS = ("sampling", "annotation", "pretraining", "finetuning", "evaluation")
"""Steps whose time grows with the number of instances."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEstimate:
    """One step of the preview; `hours` and `cost` are the maximum for one attempt, summed over all shards and nodes."""

    step: str
    image: str
    cpu: str
    memory: str
    accelerators: str
    machines: int
    spot: bool
    retries: int
    hours: float
    cost: float | None


def estimate_steps(recipe: Recipe) -> list[StepEstimate]:
    """The estimate of each step; its cost is None if the recipe has no price for its machines."""
    estimates = []
    for step in recipe.steps:
        resources = recipe.resources_of(step)
        shards = recipe.shards if STEP_SPECS[step].sharded else 1
        machines = shards * resources.nodes
        units = machines * (resources.count if resources.accelerator != "none" else 1)
        price = recipe.prices.get(resources.accelerator)
        estimates.append(
            StepEstimate(
                step=step,
                image=image(recipe, step),
                cpu=resources.cpu,
                memory=resources.memory,
                accelerators="" if resources.accelerator == "none" else f"{resources.count} x {resources.accelerator}",
                machines=machines,
                spot=resources.spot,
                retries=resources.retries,
                hours=machines * resources.hours,
                cost=None if price is None else units * resources.hours * price,
            )
        )
    return estimates


def describe_graph(recipe: Recipe) -> str:
    """The steps in order, in one line."""
    steps = list(recipe.steps)
    if recipe.shards > 1:
        sharded = [step for step in steps if STEP_SPECS[step].sharded]
        first = steps.index(sharded[0])
        steps[first : first + len(sharded)] = [f"{recipe.shards} x [{' -> '.join(sharded)}]"]
    return " -> ".join(f"{step} {CONDITION}" if step == "deployment" else step for step in steps)


def to_json(recipe: Recipe, platform: Platform) -> dict[str, object]:
    """The preview as JSON values; `most_cost` is None if some step has no price."""
    estimates = estimate_steps(recipe)
    return {
        "pipeline": recipe.pipeline,
        "platform": platform,
        "graph": describe_graph(recipe),
        "work": str(work_of(recipe, platform)),
        "steps": [asdict(estimate) for estimate in estimates],
        "most_cost": None if unpriced_steps(estimates) else max_cost(estimates),
        "most_cost_with_retries": None if unpriced_steps(estimates) else max_cost(estimates, retried=True),
    }


def max_cost(estimates: list[StepEstimate], *, retried: bool = False) -> float:
    """The maximum cost of the steps that have a price: of one attempt each, or with all retries used."""
    return sum((estimate.cost or 0.0) * (1 + estimate.retries if retried else 1) for estimate in estimates)


def unpriced_steps(estimates: list[StepEstimate]) -> list[str]:
    """The steps without a price for their machines."""
    return [estimate.step for estimate in estimates if estimate.cost is None]


def to_text(recipe: Recipe, platform: Platform) -> str:
    """The preview as text for a terminal."""
    estimates = estimate_steps(recipe)
    header = (
        "step",
        "machines",
        "cpu",
        "memory",
        "accelerators",
        "spot",
        "retries",
        "hours at most",
        "cost at most",
        "image",
    )
    rows = [
        (
            estimate.step,
            str(estimate.machines),
            estimate.cpu or "-",
            estimate.memory or "-",
            estimate.accelerators or "-",
            "yes" if estimate.spot else "-",
            str(estimate.retries),
            f"{estimate.hours:,.0f}",
            "no price" if estimate.cost is None else f"{estimate.cost:,.2f}",
            estimate.image,
        )
        for estimate in estimates
    ]
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    unpriced = unpriced_steps(estimates)
    cost = "unknown"
    if len(unpriced) < len(estimates):
        once, all_retries = max_cost(estimates), max_cost(estimates, retried=True)
        cost = f"at most {once:,.2f} without retries, {all_retries:,.2f} with all retries used"
    if unpriced:
        cost += f"; no price for {', '.join(unpriced)} (prices: in the recipe)"
    return "\n".join(
        [
            f"pipeline  {recipe.pipeline} on {platform}",
            f"graph     {describe_graph(recipe)}",
            f"work      {work_of(recipe, platform)}",
            "",
            *table,
            "",
            f"cost      {cost}",
        ]
    )


def estimate_sampling(configs: Mapping[str, StepConfig]) -> "list[Estimate] | None":
    """The estimate of sampling, per generator, from the source itself; `configs` are by step.

    Sends and writes nothing. None if the source is not on this machine or is rendered by templates, so that its
    instances are known only after preparation. It is an upper bound: preparation may drop instances.
    """
    from cappy.preparation.step import PreparationConfig
    from cappy.sampling.estimate import estimate_instances
    from cappy.sampling.step import SamplingConfig

    preparation, sampling = configs.get("preparation"), configs.get("sampling")
    if not isinstance(preparation, PreparationConfig) or not isinstance(sampling, SamplingConfig):
        return None
    instances = _instances_of(preparation)
    return None if instances is None else estimate_instances(sampling, instances)


@dataclass(frozen=True, kw_only=True)
class CrossFittingEstimate:
    """What cross-fitting would take: `groups` in all and in the test split, and estimated `seconds` of all folds."""

    groups: int
    test_groups: int
    seconds: float | None


def estimate_cross_fitting(
    configs: Mapping[str, StepConfig], work: Path, *, folds: int, enough_groups: int, keep: bool
) -> CrossFittingEstimate | None:
    """Estimates cross-fitting from the source itself; `configs` are by step.

    None if the source is known only after preparation, if the rows have splits already, or if the test split would have
    `enough_groups`. The time is None if the scorer is not on this machine. With `keep` the estimate is kept in `work`,
    so that a rerun, which must find the same work, decides the same.
    """
    from cappy.preparation.step import PreparationConfig
    from cappy.sampling.generators import estimate_tokens
    from cappy.sampling.step import SamplingConfig
    from cappy.sampling.strategies import decodings_of
    from cappy.scorers import scorer_folder
    from cappy.training.finetuning import FinetuningConfig
    from cappy.training.meter import estimate_seconds

    preparation, sampling, finetuning = (configs.get(step) for step in ("preparation", "sampling", "finetuning"))
    if (
        not isinstance(preparation, PreparationConfig)
        or not isinstance(sampling, SamplingConfig)
        or not isinstance(finetuning, FinetuningConfig)
        or preparation.source == "builtin"
        or preparation.source.startswith("hub:")
        or preparation.mixture
    ):
        return None
    rows = _rows_of(preparation)
    if rows is None:
        return None
    sampled = sum(
        decoding.num_samples
        for position in range(len(sampling.generator))
        for decoding in decodings_of(sampling.decodings, position)
    )
    groups: set[str] = set()
    responses, tokens = 0, 0.0
    for row in rows:
        if row.has_split:
            return None
        instance = row.instance
        texts = [candidate.response for candidate in instance.candidates] or [*instance.references, *instance.choices]
        count = len(instance.references) + sampled + len(instance.candidates) + len(instance.choices)
        length = estimate_tokens(instance.instruction) + max((estimate_tokens(text) for text in texts), default=0)
        groups.add(instance.group_id)
        responses += count
        tokens += count * min(length, MAX_PAIR_TOKENS)
    test_groups = round(preparation.test * len(groups))
    if len(groups) < folds or test_groups >= enough_groups:
        return None
    if parse_spec(finetuning.scorer).kind not in ("builtin", "path"):
        return CrossFittingEstimate(groups=len(groups), test_groups=test_groups, seconds=None)
    # A fold holds out one part to test and one to stop early; scoring costs a third of training a pair once.
    trained = finetuning.train_rows or finetuning.epochs * responses * (folds - 2) / folds
    pairs = folds * trained + 2 * responses / 3
    mean_tokens = tokens / max(1, responses)
    path = work / "speed" / f"cross-fitting-{fingerprint(finetuning.scorer, pairs, mean_tokens)[:16]}.json"
    try:
        seconds = float(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        seconds = estimate_seconds(scorer_folder(finetuning.scorer), pairs, mean_tokens)
        if keep:
            write_bytes(path, json.dumps(seconds).encode())
    return CrossFittingEstimate(groups=len(groups), test_groups=test_groups, seconds=seconds)


def _rows_of(config: "PreparationConfig") -> "Iterator[SourceRow] | None":
    from cappy.preparation.sources import group_rows, open_source

    source = open_source(config)
    return None if source.datasets else iter(group_rows(source, config).rows())


def _instances_of(config: "PreparationConfig") -> "Iterator[Instance] | None":
    if config.mixture or config.source.startswith("hub:"):
        return None
    rows = _rows_of(config)
    return None if rows is None else (row.instance for row in rows)


def measured_seconds(configs: Mapping[str, StepConfig], work: Path, instances: int) -> dict[str, float]:
    """Step -> seconds for this number of instances, at the rate of the last run in `work` with equal settings.

    A step that no run in `work` did with these settings is missing. The rate is per instance: longer texts or more
    candidates take longer.
    """
    records = sorted(_read_records(work), key=lambda record: record.started)
    counts = {record.run: record.metrics["instances"] for record in records if record.step == "annotation"}
    seconds = {}
    for record in records:
        count = counts.get(record.run, 0.0)
        if record.step in configs and count and _has_settings(record, configs[record.step]):
            seconds[record.step] = record.seconds * instances / count
    return {step: seconds[step] for step in MEASURED_STEPS if step in seconds}


def _read_records(work: Path) -> Iterator[StepRecord]:
    for path in (work / "records").glob("*.json"):
        try:
            record = StepRecord(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue
        if record.status == "done" and record.run and record.step in MEASURED_STEPS:
            yield record


def _has_settings(record: StepRecord, config: StepConfig) -> bool:
    """Whether the record's step had the settings of `config`, but for folders, seeds and those that it chose itself."""
    ignored = {*STEP_SPECS[record.step].artifacts, "work", "fresh", "seed", "champion"}
    values = {name: value for name, value in to_values(config).items() if name not in ignored and value is not None}
    return all(record.config.get(name) == value for name, value in values.items())


def describe_seconds(steps: tuple[str, ...], seconds: Mapping[str, float]) -> list[str]:
    """The times of the steps besides sampling as lines of text; says which are not estimated."""
    others = [step for step in MEASURED_STEPS if step in steps and step != "sampling"]
    lines = [f"  {step:<12} about {duration(seconds[step])}" for step in others if step in seconds]
    if missing := [step for step in others if step not in seconds]:
        names = ", ".join(missing)
        lines.append(f"  {names}: not estimated; no run in the work folder did them with these settings")
    return ["other steps, at the rate of the last run with these settings", *lines]
