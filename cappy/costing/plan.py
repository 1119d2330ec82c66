"""The plan of a pretraining: made from a config and a throughput, and shown as text or as JSON values."""

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from cappy.costing import PlanConfig, Throughput
from cappy.costing.costs import CPU, GENERATORS, HARDWARE, MOST_SHARDS, Cost, Work, cost, shape_of, works
from cappy.costing.volumes import Volumes, mixture_volumes
from cappy.errors import ConfigError, quote
from cappy.preparation.mixtures.plan import PUBLISHED_MILLIONS
from cappy.untrusted import JSON

WIDTH = 110
"""Columns that no sentence exceeds."""

_TERMS = ("scorer", "epochs", "validation", "workers", "mfu", "sampling_mfu", "scaling")
"""The settings that stand as `terms` in the JSON values."""
_PUBLISHED_SAMPLES = 5
"""Responses of each generator for an open-ended prompt, as the paper's (method recalled, not published code)."""

Line = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is planned: the volumes and the work of each step; `machines` are those of the measurements."""

    config: PlanConfig
    volumes: Volumes
    works: tuple[Work, ...]
    machines: tuple[str, ...] = ()

    @property
    def devices(self) -> tuple[int, ...]:
        """The numbers of devices that are compared."""
        return tuple(dict.fromkeys(self.config.gpus))

    def costs(self, devices: int) -> list[Cost]:
        """The cost of each step on so many devices."""
        cores = devices if self.config.hardware == CPU else self.config.workers
        return [cost(work, devices, self.config, cores=cores) for work in self.works]


def make_plan(config: PlanConfig, throughput: Throughput) -> Plan:
    """The plan of a pretraining; ConfigError for an unknown name and for a speed that nobody measured or assumed."""
    volumes = mixture_volumes(config.mixture, _samples_of(config.generators), throughput)
    return Plan(
        config=config,
        volumes=volumes,
        works=tuple(works(volumes, throughput, config)),
        machines=tuple(dict.fromkeys(one.machine for one in throughput.measurements)),
    )


def _samples_of(generators: Sequence[str]) -> Mapping[str, int]:
    """Candidates for an open-ended prompt by generator, from NAME or NAME:NUMBER; ConfigError says what is wrong."""
    samples: dict[str, int] = {}
    for one in generators:
        match = re.fullmatch(r"([^:]+)(?::([1-9][0-9]{0,3}))?", one)
        if match is None:
            raise ConfigError(f"plan: --generators: {quote(one)} is not a NAME or NAME:NUMBER; write as bart0:5")
        shape_of(match[1], GENERATORS, "generators")
        if match[1] in samples:
            raise ConfigError(f"plan: --generators: {quote(match[1])} stands twice; give its number once")
        samples[match[1]] = int(match[2] or _PUBLISHED_SAMPLES)
    return samples


def text(plan: Plan) -> str:
    """The plan as plain text: what each step does, how long it takes on so many devices, and what that rests on."""
    blocks = [_rows(plan), _align(_work_lines(plan)), _align(_time_lines(plan))]
    sentences = [textwrap.fill(one, WIDTH, initial_indent="- ", subsequent_indent="  ") for one in assumptions(plan)]
    return "\n\n".join([*blocks, "\n".join(["Rests on", *sentences])])


def to_values(plan: Plan) -> dict[str, JSON]:
    """The plan as JSON values; seconds, hours and bytes are numbers, each step says whether its speed was measured."""
    volumes = {**asdict(plan.volumes), "candidates": plan.volumes.candidates}
    return {
        "mixture": plan.config.mixture,
        "hardware": plan.config.hardware,
        "terms": {name: getattr(plan.config, name) for name in _TERMS},
        "volumes": volumes,
        "steps": [asdict(work) for work in plan.works],
        "by_devices": {
            str(number): {"steps": [asdict(one) for one in plan.costs(number)], **_sums(plan, number)}
            for number in plan.devices
        },
        "bytes": sum(work.bytes for work in plan.works),
        "rests_on": list(assumptions(plan)),
    }


def assumptions(plan: Plan) -> Iterator[str]:
    """What the numbers rest on and leave out, a sentence each; those that nobody measured say so."""
    volumes, config = plan.volumes, plan.config
    assumed = [work for work in plan.works if not work.measured]
    if assumed:
        yield (
            f"NOT MEASURED on {config.hardware}: {', '.join(work.name for work in assumed)}. Their speed is a share of "
            f"the data-sheet peak, {(HARDWARE[config.hardware] or 0) / 1e12:,.0f} TFLOP/s in dense bf16, that the "
            "flags say, and is worth as much as that guess."
        )
    yield f"Measured speeds: one thread, seconds of the processor's time, on {'; '.join(plan.machines)}."
    if config.hardware != CPU:
        yield (
            f"Preparation and annotation run on {config.workers} cores (--workers), each as fast as the calibrated "
            "one; twice the cores are taken to halve the time."
        )
    if max(plan.devices) > 1:
        overhead = "no overhead, an upper bound" if config.scaling == 1 else "an assumption"
        yield (
            f"Training on several devices keeps {config.scaling:g} of linear speed (--scaling; {overhead}; never "
            f"measured). Sampling shares nothing and is spread over at most {MOST_SHARDS} shards, a device each. "
            "Devices that wait for tokens count, those that a step does not use do not."
        )
    yield (
        f"Lengths were measured on prompts of {volumes.known:.0%} of the mixture (the first 200 rows of each dataset), "
        "in the scorer's tokens; means of those stand for the rest. Candidates are taken to be as long as the "
        "references are, and all different: training drops those that repeat."
    )
    yield (
        f"Pretraining: {config.epochs:g} {'pass' if config.epochs == 1 else 'passes'} over the rows, "
        f"{config.validation:.1%} of the instances held out and checked on the way, no early stop. Evaluation: scores "
        "on one device; statistics and plots are left out. Storage: one copy of each folder; loading of large models, "
        "joining of shards, queues, failures and transfers are left out."
    )


def _rows(plan: Plan) -> str:
    volumes = plan.volumes
    each = " + ".join(f"{number} of {name}" for name, number in volumes.samples.items())
    published = f"{PUBLISHED_MILLIONS} million by the paper's authors' count" if plan.config.mixture == "t0" else ""
    return "\n".join(
        [
            f"mixture {plan.config.mixture}: {volumes.prompts:,} prompts, {volumes.open_prompts:,} of them open-ended",
            f"candidates: {volumes.candidates:,} ({each} for each open-ended prompt)",
            f"rows to pretrain on: {volumes.pairs:,} pairs, {volumes.pair.tokens:,.0f} tokens in the mean"
            + (f" ({published})" if published else ""),
            f"scorer: {plan.config.scorer}; hardware: {plan.config.hardware}",
        ]
    )


def _work_lines(plan: Plan) -> list[Line]:
    lines: list[Line] = [("step", "work", "tokens", "storage", "speed of one")]
    for work in plan.works:
        amount = f"{work.amount:.3g} FLOP" if work.unit == "FLOP" else f"{work.amount:,.0f} {work.unit}"
        lines.append((work.name, amount, _tokens(work.tokens), format_bytes(work.bytes), work.basis))
    return lines


def _time_lines(plan: Plan) -> list[Line]:
    unit = "core" if plan.config.hardware == CPU else "GPU"
    costs = {number: plan.costs(number) for number in plan.devices}
    lines: list[Line] = [("wall-clock", *(f"{number} {unit}{'s' if number > 1 else ''}" for number in plan.devices))]
    for place, work in enumerate(plan.works):
        lines.append((work.name, *(span(costs[number][place].seconds) for number in plan.devices)))
    sums = [_sums(plan, number) for number in plan.devices]
    lines.append(("total", *(span(one["seconds"]) for one in sums)))
    if plan.config.hardware != CPU:
        lines.append(("GPU-hours", *(f"{one['device_hours']:,.0f}" for one in sums)))
    lines.append(("core-hours", *(f"{one['core_hours']:,.0f}" for one in sums)))
    if plan.config.price is not None:
        lines.append((f"price, {plan.config.price:g} a {unit}-hour", *(f"{one['price']:,.0f}" for one in sums)))
    return lines


def _sums(plan: Plan, devices: int) -> Mapping[str, float]:
    """Sums over the steps, which run one after another; the hours of a CPU's devices are core-hours."""
    costs = plan.costs(devices)
    hours, cores = sum(one.device_hours for one in costs), sum(one.core_hours for one in costs)
    if plan.config.hardware == CPU:
        hours, cores = 0.0, cores + hours
    sums = {"seconds": sum(one.seconds for one in costs), "device_hours": hours, "core_hours": cores}
    if plan.config.price is not None:
        sums["price"] = plan.config.price * (cores if plan.config.hardware == CPU else hours)
    return sums


def span(seconds: float) -> str:
    """A time as a person says it, in one unit."""
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h"), (730 * 86_400, 86_400, "d")):
        if seconds < limit:
            return f"{seconds / size:.{0 if seconds / size >= 10 else 1}f} {unit}"
    return f"{seconds / (365.25 * 86_400):,.1f} years"


def format_bytes(count: float) -> str:
    """Bytes as a person says them; empty for none."""
    for limit, size, unit in ((1e6, 1e3, "kB"), (1e9, 1e6, "MB"), (1e12, 1e9, "GB")):
        if count < limit:
            return f"{count / size:.3g} {unit}" if count else ""
    return f"{count / 1e12:.3g} TB"


def _tokens(count: float) -> str:
    if not count:
        return ""
    return f"{count / 1e9:,.1f} billion" if count >= 1e8 else f"{count / 1e6:,.2g} million"


def _align(lines: Sequence[Line]) -> str:
    """Columns padded to their widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
    return "\n".join(padded)
