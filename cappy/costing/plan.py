"""Plans a pretraining from a config and measured speeds; formats the plan as text or as JSON values."""

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from cappy.costing import PlanConfig, Throughput
from cappy.costing.costs import CPU, GENERATORS, HARDWARE, MAX_SHARDS, Cost, Work, cost, find_shape, list_work
from cappy.costing.volumes import Volumes, mixture_volumes
from cappy.errors import ConfigError, quote
from cappy.preparation.mixtures.plan import PUBLISHED_MILLIONS
from cappy.untrusted import JSON

WIDTH = 110
"""Line width of the assumptions in characters."""

_REPORTED_SETTINGS = ("scorer", "epochs", "validation", "workers", "mfu", "sampling_mfu", "scaling")
"""The settings in the object `terms` of the JSON values."""
_PUBLISHED_SAMPLES = 5
"""Responses per generator and open-ended prompt in the paper (as described, not from published code)."""

Line = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainingPlan:
    """The volumes and the work of each step; `machines` are those on which the speeds were measured."""

    config: PlanConfig
    volumes: Volumes
    steps: tuple[Work, ...]
    machines: tuple[str, ...] = ()

    @property
    def devices(self) -> tuple[int, ...]:
        """The numbers of devices to compare."""
        return tuple(dict.fromkeys(self.config.gpus))

    def costs(self, devices: int) -> list[Cost]:
        """The cost of each step on this number of devices."""
        cores = devices if self.config.hardware == CPU else self.config.workers
        return [cost(work, devices, self.config, cores=cores) for work in self.steps]


def make_plan(config: PlanConfig, throughput: Throughput) -> PretrainingPlan:
    """Plans a pretraining; raises ConfigError for an unknown name or a speed that is neither measured nor assumed."""
    volumes = mixture_volumes(config.mixture, _parse_samples(config.generators), throughput)
    return PretrainingPlan(
        config=config,
        volumes=volumes,
        steps=tuple(list_work(volumes, throughput, config)),
        machines=tuple(dict.fromkeys(measurement.machine for measurement in throughput.measurements)),
    )


def _parse_samples(generators: Sequence[str]) -> Mapping[str, int]:
    """Parses NAME or NAME:NUMBER; returns the candidates per open-ended prompt of each generator."""
    samples: dict[str, int] = {}
    for generator in generators:
        match = re.fullmatch(r"([^:]+)(?::([1-9][0-9]{0,3}))?", generator)
        if match is None:
            raise ConfigError(
                f"plan: --generators: expected NAME or NAME:NUMBER such as bart0:5, got {quote(generator)}"
            )
        find_shape(match[1], GENERATORS, "generators")
        if match[1] in samples:
            raise ConfigError(f"plan: --generators: {quote(match[1])} is given twice; give it once")
        samples[match[1]] = int(match[2] or _PUBLISHED_SAMPLES)
    return samples


def text(plan: PretrainingPlan) -> str:
    """The plan as plain text: the work of each step, its time by number of devices, and the assumptions."""
    blocks = [_format_volumes(plan), _align(_work_lines(plan)), _align(_time_lines(plan))]
    items = [textwrap.fill(item, WIDTH, initial_indent="- ", subsequent_indent="  ") for item in assumptions(plan)]
    return "\n\n".join([*blocks, "\n".join(["Assumptions", *items])])


def to_values(plan: PretrainingPlan) -> dict[str, JSON]:
    """The plan as JSON values, in seconds, hours and bytes; each step says whether its speed was measured."""
    volumes = asdict(plan.volumes)
    volumes |= {"known": volumes.pop("measured_share"), "candidates": plan.volumes.candidates}
    return {
        "mixture": plan.config.mixture,
        "hardware": plan.config.hardware,
        "terms": {name: getattr(plan.config, name) for name in _REPORTED_SETTINGS},
        "volumes": volumes,
        "steps": [asdict(work) for work in plan.steps],
        "by_devices": {
            str(number): {"steps": [asdict(step_cost) for step_cost in plan.costs(number)], **_sums(plan, number)}
            for number in plan.devices
        },
        "bytes": sum(work.bytes for work in plan.steps),
        "rests_on": list(assumptions(plan)),
    }


def assumptions(plan: PretrainingPlan) -> Iterator[str]:
    """Yields what the numbers are based on and what they leave out, as a list of short paragraphs."""
    volumes, config = plan.volumes, plan.config
    assumed = [work for work in plan.steps if not work.measured]
    if assumed:
        peak = f"{(HARDWARE[config.hardware] or 0) / 1e12:,.0f} TFLOP/s in dense bf16"
        yield (
            f"NOT MEASURED on {config.hardware}: {', '.join(work.name for work in assumed)}. Their speed is assumed to "
            f"be the given share of the data-sheet peak, {peak}."
        )
    yield f"Measured speeds: one thread, CPU time, on {'; '.join(plan.machines)}."
    if config.hardware != CPU:
        yield (
            f"Preparation and annotation run on {config.workers} cores (--workers), each as fast as the measured "
            "one; the speedup is assumed to be linear."
        )
    if max(plan.devices) > 1:
        overhead = "no overhead, an upper bound" if config.scaling == 1 else "an assumption"
        yield (
            f"Training on several devices reaches {config.scaling:g} of linear speedup (--scaling; {overhead}; not "
            f"measured). Sampling runs in up to {MAX_SHARDS} independent shards with a device each. Device-hours "
            "include devices that wait for tokenization, but not devices that a step does not use."
        )
    yield (
        f"Lengths were measured on prompts of {volumes.measured_share:.0%} of the mixture (the first 200 rows of each "
        "dataset), in the scorer's tokens; the rest is assumed to have the same means. Candidates are assumed to be as "
        "long as the references, and all different: training drops duplicates."
    )
    yield (
        f"Pretraining: {config.epochs:g} {'pass' if config.epochs == 1 else 'passes'} over the rows, "
        f"{config.validation:.1%} of the instances held out for validation, no early stopping. Evaluation: scoring on "
        "one device; statistics and plots are not included. Storage: one copy of each folder. Loading of large models, "
        "joining of shards, queues, failures and transfers are not included."
    )


def _format_volumes(plan: PretrainingPlan) -> str:
    volumes = plan.volumes
    per_prompt = " + ".join(f"{number} of {name}" for name, number in volumes.samples.items())
    published = f"{PUBLISHED_MILLIONS} million according to the paper's authors" if plan.config.mixture == "t0" else ""
    return "\n".join(
        [
            f"mixture {plan.config.mixture}: {volumes.prompts:,} prompts, {volumes.open_prompts:,} of them open-ended",
            f"candidates: {volumes.candidates:,} ({per_prompt} for each open-ended prompt)",
            f"training rows: {volumes.pairs:,} pairs, {volumes.pair.tokens:,.0f} tokens on average"
            + (f" ({published})" if published else ""),
            f"scorer: {plan.config.scorer}; hardware: {plan.config.hardware}",
        ]
    )


def _work_lines(plan: PretrainingPlan) -> list[Line]:
    lines: list[Line] = [("step", "work", "tokens", "storage", "speed of one device or core")]
    for work in plan.steps:
        amount = f"{work.amount:.3g} FLOP" if work.unit == "FLOP" else f"{work.amount:,.0f} {work.unit}"
        lines.append((work.name, amount, _format_tokens(work.tokens), format_bytes(work.bytes), work.basis))
    return lines


def _time_lines(plan: PretrainingPlan) -> list[Line]:
    unit = "core" if plan.config.hardware == CPU else "GPU"
    costs = {number: plan.costs(number) for number in plan.devices}
    lines: list[Line] = [("wall-clock", *(f"{number} {unit}{'s' if number > 1 else ''}" for number in plan.devices))]
    for index, work in enumerate(plan.steps):
        lines.append((work.name, *(format_duration(costs[number][index].seconds) for number in plan.devices)))
    sums = [_sums(plan, number) for number in plan.devices]
    lines.append(("total", *(format_duration(total["seconds"]) for total in sums)))
    if plan.config.hardware != CPU:
        lines.append(("GPU-hours", *(f"{total['device_hours']:,.0f}" for total in sums)))
    lines.append(("core-hours", *(f"{total['core_hours']:,.0f}" for total in sums)))
    if plan.config.price is not None:
        lines.append((f"price, {plan.config.price:g} a {unit}-hour", *(f"{total['price']:,.0f}" for total in sums)))
    return lines


def _sums(plan: PretrainingPlan, devices: int) -> Mapping[str, float]:
    """Totals of the steps, which run one after another; device-hours of CPUs are core-hours."""
    costs = plan.costs(devices)
    device_hours, core_hours = sum(cost.device_hours for cost in costs), sum(cost.core_hours for cost in costs)
    if plan.config.hardware == CPU:
        device_hours, core_hours = 0.0, core_hours + device_hours
    sums = {"seconds": sum(cost.seconds for cost in costs), "device_hours": device_hours, "core_hours": core_hours}
    if plan.config.price is not None:
        sums["price"] = plan.config.price * (core_hours if plan.config.hardware == CPU else device_hours)
    return sums


def format_duration(seconds: float) -> str:
    """A duration in seconds as text in a suitable unit."""
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h"), (730 * 86_400, 86_400, "d")):
        if seconds < limit:
            return f"{seconds / size:.{0 if seconds / size >= 10 else 1}f} {unit}"
    return f"{seconds / (365.25 * 86_400):,.1f} years"


def format_bytes(count: float) -> str:
    """A number of bytes as text in a suitable unit; "" for 0."""
    for limit, size, unit in ((1e6, 1e3, "kB"), (1e9, 1e6, "MB"), (1e12, 1e9, "GB")):
        if count < limit:
            return f"{count / size:.3g} {unit}" if count else ""
    return f"{count / 1e12:.3g} TB"


def _format_tokens(count: float) -> str:
    if not count:
        return ""
    return f"{count / 1e9:,.1f} billion" if count >= 1e8 else f"{count / 1e6:,.2g} million"


def _align(lines: Sequence[Line]) -> str:
    """A table with columns padded to their widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
    return "\n".join(padded)
