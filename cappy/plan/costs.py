"""What each step takes: seconds, hours of devices and of cores, bytes; from volumes and measured speeds."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from cappy.errors import ConfigError, shown
from cappy.plan.calibration import Calibration, Step
from cappy.plan.shapes import GENERATORS, SCORERS, ScorerShape, shape_of
from cappy.plan.volumes import Volumes
from cappy.training.meter import PEAKS

CPU = "cpu"
"""The hardware that the calibration measured; a device of it is one core."""
MOST_SHARDS = 64
"""Shards of a pipeline's sampling, with a device each: collected artifacts hurt above (docs/scale.md)."""
CHECKS = 11
"""Times that pretraining scores the validation instances at its default, the first and the last check included."""
CHECKED = 16
"""Responses of a validation instance that a check scores at most (`cappy.training.checks.CANDIDATES`)."""
CHECKPOINTS = 2
"""Generations of checkpoints kept at a time."""
END = 1
"""Token that a generator draws after those of a response."""

HARDWARE: Mapping[str, float | None] = {
    CPU: None,
    **{name.lower().replace(" ", "-"): peak for name, peak in PEAKS.items()},
}
"""Hardware -> dense bf16 FLOP/s of one device by its data sheet, None of a CPU."""

Pool = Literal["devices", "cores"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a plan assumes, each of it a flag.

    `mfu` and `sampling_mfu` are shares of the data sheet's peak, read only where nothing was measured. `scaling` is the
    share of linear speed that training keeps on several devices.
    """

    scorer: str
    epochs: float = 1.0
    validation: float = 0.002
    workers: int = 16
    mfu: float | None = None
    sampling_mfu: float | None = None
    scaling: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a step has to do, and how fast one device or core does it.

    `amount` is in `unit`, `rate` the same in a second, `start` the seconds before it begins, `most` the devices that
    can share it. `linear` is false where sharing costs, `holds` true where all devices wait on one core. `basis` says
    where the rate is from, and `measured` whether anybody measured it.
    """

    step: Step
    name: str
    amount: float
    unit: str
    rate: float
    start: float
    basis: str
    measured: bool
    pool: Pool = "devices"
    most: int | None = None
    linear: bool = True
    holds: bool = False
    tokens: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """A step on so many devices: wall-clock seconds, and the hours of devices and of CPU cores that it takes."""

    name: str
    used: int
    seconds: float
    device_hours: float
    core_hours: float


def peak_of(hardware: str) -> float | None:
    """The data sheet's FLOP/s of one device; ConfigError for hardware that is not known."""
    if hardware not in HARDWARE:
        raise ConfigError(f"plan: --hardware: no hardware {shown(hardware)}; choose of {', '.join(HARDWARE)}")
    return HARDWARE[hardware]


def cost(work: Work, devices: int, terms: Terms, *, cores: int) -> Cost:
    """What a step takes on so many devices, the CPU steps on so many cores."""
    available = devices if work.pool == "devices" else cores
    used = min(available, work.most or available)
    share = 1.0 if work.linear or used == 1 else terms.scaling
    seconds = work.start + work.amount / (work.rate * used * share)
    hours = seconds * used / 3600
    return Cost(
        name=work.name,
        used=used,
        seconds=seconds,
        device_hours=seconds * devices / 3600 if work.holds else hours if work.pool == "devices" else 0.0,
        core_hours=hours if work.pool == "cores" else 0.0,
    )


def works(volumes: Volumes, calibration: Calibration, hardware: str, terms: Terms, *, texts: str) -> list[Work]:
    """The steps in order; ConfigError where a speed was neither measured nor is assumed.

    `texts` names the mixture whose measurements hold for prompts and pairs.
    """
    peak_of(hardware)
    found = _Rates(calibration, hardware, terms, texts)
    scorer = shape_of(terms.scorer, SCORERS, "scorer")
    stored = _stored(volumes, found)
    sampled = list(_sampling(volumes, found, stored["sampling"]))
    return [
        found.cpu("preparation", "prompts/s", volumes.prompts, bytes=stored["preparation"]),
        *sampled,
        found.cpu("annotation", "pairs/s", volumes.pairs, bytes=stored["annotation"]),
        _tokenization(volumes, found, stored["tokenization"]),
        _pretraining(volumes, found, scorer, terms),
        _evaluation(volumes, found, scorer, terms),
    ]


@dataclass(frozen=True, slots=True)
class _Rates:
    """Speeds by step: what was measured, else what is assumed."""

    calibration: Calibration
    hardware: str
    terms: Terms
    texts: str

    def start(self, step: Step) -> float:
        """Seconds before a step begins, measured with the built-in models; 0 where it is part of another step."""
        found = self.calibration.find(step, "seconds to start", hardware=CPU, of="builtin")
        return found.value if found else 0.0

    def cpu(self, step: Step, unit: Literal["prompts/s", "pairs/s"], amount: float, *, bytes: float) -> Work:
        """A step that CPU cores do, whatever the devices are."""
        found = self.calibration.need(step, unit, hardware=CPU, of=self.texts)
        return Work(
            step=step, name=step, amount=amount, unit=unit.removesuffix("/s"), rate=found.value, pool="cores",
            start=self.start(step), basis=f"measured {found.date}: {found.value:,.0f} {unit} a core", measured=True,
            bytes=bytes,
        )  # fmt: skip

    def flops(self, step: Step, of: str) -> tuple[float, str, bool]:
        """FLOP/s of a device at a step, where that number is from, and whether it was measured."""
        peak = peak_of(self.hardware)
        look = self.calibration.need if peak is None else self.calibration.find
        found = look(step, "FLOP/s", hardware=self.hardware, of=of)
        if found is not None:
            return found.value, f"measured {found.date}: {found.value / 1e9:,.0f} GFLOP/s a device", True
        assert peak is not None  # noqa: S101 (`need` has raised)
        flag, share = ("--sampling-mfu", self.terms.sampling_mfu) if step == "sampling" else ("--mfu", self.terms.mfu)
        if share is None:
            raise ConfigError(
                f"plan: {step} of {of} was never measured on {self.hardware}; give {flag}, the share of its data "
                f"sheet's {peak / 1e12:,.0f} TFLOP/s that you assume, above 0 and at most 1"
            )
        told = f"not measured: assumes {share:g} of the data-sheet peak ({flag})"
        return peak * share, told, False


def _stored(volumes: Volumes, found: _Rates) -> dict[str, float]:
    """Bytes of what each step writes; every folder of records holds the prompts again."""
    need, texts = found.calibration.need, found.texts
    prompts = volumes.prompts * need("preparation", "bytes/prompt", hardware=CPU, of=texts).value
    candidates = volumes.candidates * need("sampling", "bytes/pair", hardware=CPU, of=texts).value
    labelled = volumes.pairs * need("annotation", "bytes/pair", hardware=CPU, of=texts).value
    tokens = volumes.pairs * need("tokenization", "bytes/pair", hardware=CPU, of=texts).value
    return {
        "preparation": prompts,
        "sampling": prompts + candidates,
        "annotation": prompts + labelled,
        "tokenization": tokens,
    }


def _sampling(volumes: Volumes, found: _Rates, stored: float) -> Iterator[Work]:
    """One work for each generator, in turn over the same shards; the last one's folder is the one that stays."""
    drawn = volumes.response_tokens + END
    for place, (name, samples) in enumerate(volumes.samples.items(), start=1):
        shape = shape_of(name, GENERATORS, "generators")
        prompts = shape.prompt_flops(volumes.prompt.tokens, volumes.prompt.squared)
        responses = samples * shape.response_flops(drawn, volumes.prompt.tokens)
        rate, basis, measured = found.flops("sampling", name)
        yield Work(
            step="sampling", name=f"sampling {name}", amount=volumes.open_prompts * (prompts + responses),
            unit="FLOP", rate=rate, start=found.start("sampling"), basis=basis, measured=measured, most=MOST_SHARDS,
            tokens=volumes.open_prompts * (volumes.prompt.tokens + samples * drawn),
            bytes=stored if place == len(volumes.samples) else 0.0,
        )  # fmt: skip


def _tokenization(volumes: Volumes, found: _Rates, stored: float) -> Work:
    """What pretraining does first, in one process, while its devices wait."""
    rate = found.calibration.need("tokenization", "pairs/s", hardware=CPU, of=found.texts)
    return Work(
        step="tokenization", name="pretraining: tokens", amount=volumes.pairs, unit="pairs", rate=rate.value,
        start=0.0, basis=f"measured {rate.date}: {rate.value:,.0f} pairs/s, on one core", measured=True,
        pool="cores", most=1, holds=found.hardware != CPU, bytes=stored,
    )  # fmt: skip


def _pretraining(volumes: Volumes, found: _Rates, scorer: ScorerShape, terms: Terms) -> Work:
    """Every epoch and the checks on the way, no early stop."""
    trained = volumes.pairs * (1 - terms.validation) * terms.epochs
    per_prompt = min(1.0, CHECKED / max(1.0, volumes.selectable / volumes.prompts))
    checked = volumes.selectable * per_prompt * terms.validation * CHECKS
    rate, basis, measured = found.flops("pretraining", terms.scorer)
    tokens, squared = volumes.pair.tokens, volumes.pair.squared
    kept = found.calibration.need("pretraining", "bytes/weight", hardware=CPU, of="builtin")
    return Work(
        step="pretraining", name="pretraining", unit="FLOP", rate=rate, start=found.start("pretraining"),
        amount=trained * scorer.training_flops(tokens, squared) + checked * scorer.scoring_flops(tokens, squared),
        basis=basis, measured=measured, linear=False, tokens=trained * tokens,
        bytes=scorer.weights * (4 + CHECKPOINTS * kept.value),
    )  # fmt: skip


def _evaluation(volumes: Volumes, found: _Rates, scorer: ScorerShape, terms: Terms) -> Work:
    """Scores of the held-out pairs, on one device."""
    rate, basis, measured = found.flops("evaluation", terms.scorer)
    tokens, squared = volumes.evaluated_pair.tokens, volumes.evaluated_pair.squared
    return Work(
        step="evaluation", name="evaluation", amount=volumes.evaluated_pairs * scorer.scoring_flops(tokens, squared),
        unit="FLOP", rate=rate, start=found.start("evaluation"), basis=basis, measured=measured, most=1,
        tokens=volumes.evaluated_pairs * tokens,
    )  # fmt: skip
