"""The preview of a run: its graph, the resources of each step, and the maximum cost."""

from dataclasses import asdict, dataclass

from cappy.steps import STEP_SPECS
from pipelines.customize import image
from pipelines.planning import work_of
from pipelines.recipe import Platform, Recipe

CONDITION = "(if promoted)"


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
