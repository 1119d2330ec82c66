"""What a pretraining will take: the settings of the plan, and the speeds that it is reckoned from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AliasChoices, Field, TypeAdapter, ValidationError

import cappy
from cappy.config import Renames, settings
from cappy.errors import ConfigError

MAX_DEVICES = 256


@settings
class PlanConfig:
    """What is planned, and what is assumed: each a flag of `cappy plan`."""

    RENAMED: ClassVar[Renames] = {"calibration": "throughput"}

    hardware: Annotated[
        str, Field(description="What it runs on: cpu (a device is a core), or a GPU such as h100, a100, l4")
    ]
    mixture: Annotated[str, Field(description="Datasets to pretrain on: t0")] = "t0"
    generators: Annotated[
        tuple[str, ...],
        Field(
            description="LLM whose responses are sampled, and how many for a prompt, as bart0:5; these are the paper's"
        ),
    ] = ("bart0:5", "t0-3b:5")
    gpus: Annotated[tuple[int, ...], Field(description=f"Devices, 1 to {MAX_DEVICES}; a column for each number")] = (
        1,
        8,
        64,
        256,
    )
    scorer: Annotated[str, Field(description="Shape of the scorer: builtin, mini, roberta-base, roberta-large")] = (
        "roberta-large"
    )
    epochs: Annotated[float, Field(ge=0.001, description="Passes over the rows")] = 1.0
    validation: Annotated[
        float, Field(ge=0, le=0.5, description="Share of the instances that checks score instead")
    ] = 0.002
    workers: Annotated[
        int, Field(ge=1, le=4096, description="CPU cores for preparation and annotation, beside GPUs")
    ] = 16
    mfu: Annotated[
        float | None,
        Field(
            description="Share of the data sheet's peak that training and scoring reach: an assumption, "
            "where not measured"
        ),
    ] = None
    sampling_mfu: Annotated[
        float | None, Field(description="The same of sampling, whose tokens come one at a time")
    ] = None
    scaling: Annotated[
        float, Field(ge=0.01, le=1, description="Share of linear speed that training keeps on several devices")
    ] = 1.0
    price: Annotated[float | None, Field(ge=0, description="Money for a device-hour; none is built in")] = None
    throughput: Annotated[
        Path | None,
        Field(description="File of measured speeds, written by benchmarks/throughput.py; left out: that of this clone"),
    ] = None

    def __post_init__(self) -> None:
        for flag, number in (("--epochs", self.epochs), ("--price", self.price)):
            if number is not None and not math.isfinite(number):
                raise ConfigError(f"plan: {flag}: {number} is not a number to reckon with; give a finite one")
        for flag, share in (("--mfu", self.mfu), ("--sampling-mfu", self.sampling_mfu)):
            if share is not None and not 0 < share <= 1:
                raise ConfigError(f"plan: {flag}: {share:g} is not a share of a peak; give one above 0 and at most 1")
        wrong = next((number for number in self.gpus if not 1 <= number <= MAX_DEVICES), None)
        if wrong is not None:
            raise ConfigError(f"plan: --gpus: {wrong} is out of range; give 1 to {MAX_DEVICES}, repeated to compare")


DEFAULT = Path(cappy.__file__).parents[1] / "benchmarks/results/throughput.json"
"""Where the measurements of this project's own machine lie in a clone."""

REMEDY = "write it with python benchmarks/throughput.py, or name another with --throughput"

Step = Literal["preparation", "sampling", "annotation", "tokenization", "pretraining", "evaluation"]
Unit = Literal["prompts/s", "pairs/s", "FLOP/s", "seconds to start", "bytes/prompt", "bytes/pair", "bytes/weight"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Lengths of one kind of a subset's prompts, in tokens of the scorer, as means over `prompts` of them.

    Prompts are cut at what a generator reads, responses at what it writes, pairs at what the scorer reads; `_squared`
    are means of squares.
    """

    subset: str
    kind: Literal["choices", "open-ended"]
    prompts: int
    prompt_tokens: float
    prompt_squared: float
    response_tokens: float
    pair_tokens: float
    pair_squared: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One number: of a `step` on a `hardware`, `of` a shape or the texts of a mixture, on one device or core.

    `details` holds what it was computed from and other ways to say it (tokens and pairs per second, mean lengths, the
    share of the data sheet's peak where there is one), `load` the machine's load average before it.
    """

    step: Step
    hardware: str
    of: str
    unit: Unit
    value: float
    date: str
    machine: str
    load: float
    # Files of earlier releases call it "told".
    details: Annotated[Mapping[str, float], Field(validation_alias=AliasChoices("details", "told"))] = field(
        default_factory=dict
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """Lengths of the texts of each mixture, and the measurements."""

    benchmark: Literal["throughput", "calibration"]  # The second in files of earlier releases.
    texts: Mapping[str, tuple[Texts, ...]]
    measurements: tuple[Measurement, ...]

    def texts_of(self, mixture: str) -> tuple[Texts, ...]:
        """Lengths of the texts of a mixture; ConfigError where none were measured."""
        if not self.texts.get(mixture):
            raise ConfigError(f"plan: the measured speeds have no lengths of the texts of {mixture}; {REMEDY}")
        return self.texts[mixture]

    def find(self, step: Step, unit: Unit, *, hardware: str, of: str) -> Measurement | None:
        """The measurement, or None where there is none."""
        asked = (step, unit, hardware, of)
        return next((m for m in self.measurements if (m.step, m.unit, m.hardware, m.of) == asked), None)

    def need(self, step: Step, unit: Unit, *, hardware: str, of: str) -> Measurement:
        """The measurement; ConfigError says which are missing and which there are."""
        measurement = self.find(step, unit, hardware=hardware, of=of)
        if measurement is None:
            others = [m.of for m in self.measurements if (m.step, m.unit, m.hardware) == (step, unit, hardware)]
            there = f"measured on {hardware}: {', '.join(others) or 'nothing'}"
            raise ConfigError(f"plan: {step} of {of}, in {unit}, was not measured on {hardware} ({there}); {REMEDY}")
        return measurement


def read_throughput(path: Path) -> Throughput:
    """The measured speeds of a file; ConfigError where it is missing, damaged or holds a number that cannot be."""
    if not path.is_file():
        raise ConfigError(f"plan: {path}: no such file of measured speeds; {REMEDY}")
    try:
        throughput = TypeAdapter(Throughput).validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"plan: {path}: is not a file of measured speeds ({where or 'file'}: {first['msg']}); {REMEDY}"
        ) from error
    wrong = next((m for m in throughput.measurements if not 0 < m.value < float("inf")), None)
    if wrong:
        raise ConfigError(f"plan: {path}: {wrong.step} of {wrong.of} is {wrong.value} {wrong.unit}; {REMEDY}")
    return throughput
