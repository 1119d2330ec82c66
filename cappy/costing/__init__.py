"""Estimates the time and resources of pretraining; this module has the config and reads the measured speeds."""

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
    """The settings of `cappy plan`: what to plan and what to assume."""

    RENAMED: ClassVar[Renames] = {"calibration": "throughput"}

    hardware: Annotated[str, Field(description="Hardware: cpu (a device is a core), or a GPU such as h100, a100, l4")]
    mixture: Annotated[str, Field(description="Datasets to pretrain on: t0")] = "t0"
    generators: Annotated[
        tuple[str, ...],
        Field(description="LLM and number of responses per prompt, such as bart0:5; default: those of the paper"),
    ] = ("bart0:5", "t0-3b:5")
    gpus: Annotated[
        tuple[int, ...],
        Field(description=f"Numbers of devices to compare, 1 to {MAX_DEVICES}; the plan has one column per number"),
    ] = (
        1,
        8,
        64,
        256,
    )
    scorer: Annotated[str, Field(description="Shape of the scorer: builtin, mini, roberta-base, roberta-large")] = (
        "roberta-large"
    )
    epochs: Annotated[float, Field(ge=0.001, description="Passes over the data")] = 1.0
    validation: Annotated[float, Field(ge=0, le=0.5, description="Share of the instances held out for validation")] = (
        0.002
    )
    workers: Annotated[
        int, Field(ge=1, le=4096, description="CPU cores for preparation and annotation, besides GPUs")
    ] = 16
    mfu: Annotated[
        float | None,
        Field(description="Assumed share of the data sheet's peak FLOP/s for training and scoring, if not measured"),
    ] = None
    sampling_mfu: Annotated[
        float | None, Field(description="Assumed share of the peak for sampling, which generates one token at a time")
    ] = None
    scaling: Annotated[
        float, Field(ge=0.01, le=1, description="Share of linear speedup that training reaches on several devices")
    ] = 1.0
    price: Annotated[float | None, Field(ge=0, description="Price of a device-hour")] = None
    throughput: Annotated[
        Path | None,
        Field(description="File of measured speeds from benchmarks/throughput.py; default: the one in this repository"),
    ] = None

    def __post_init__(self) -> None:
        for flag, number in (("--epochs", self.epochs), ("--price", self.price)):
            if number is not None and not math.isfinite(number):
                raise ConfigError(f"plan: {flag}: expected a finite number, got {number}")
        for flag, share in (("--mfu", self.mfu), ("--sampling-mfu", self.sampling_mfu)):
            if share is not None and not 0 < share <= 1:
                raise ConfigError(f"plan: {flag}: expected a share above 0 and at most 1, got {share:g}")
        invalid = next((number for number in self.gpus if not 1 <= number <= MAX_DEVICES), None)
        if invalid is not None:
            raise ConfigError(f"plan: --gpus: {invalid} is out of range; give 1 to {MAX_DEVICES}, repeated to compare")


DEFAULT_THROUGHPUT_PATH = Path(cappy.__file__).parents[1] / "benchmarks/results/throughput.json"
"""Path of the measurements in a clone of the repository."""

REMEDY = "write the file with python benchmarks/throughput.py, or give another file with --throughput"

Step = Literal["preparation", "sampling", "annotation", "tokenization", "pretraining", "evaluation"]
Unit = Literal["prompts/s", "pairs/s", "FLOP/s", "seconds to start", "bytes/prompt", "bytes/pair", "bytes/weight"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextLengths:
    """Mean lengths, in scorer tokens, of the prompts of one `kind` in one `subset` of a mixture.

    `prompts` is the number of prompts measured. Prompts and responses are truncated to the limits of a generator, pairs
    to that of the scorer. Fields that end in `_squared` are means of squares.
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
    """One measured value of a `step` on one device or core of `hardware`.

    `subject` names the model shape or the mixture that was measured. `details` has related values (tokens and pairs per
    second, mean lengths, the share of the data sheet's peak), `load` is the load average of the machine before the
    measurement.
    """

    step: Step
    hardware: str
    subject: Annotated[str, Field(alias="of")]  # "of" in the file.
    unit: Unit
    value: float
    date: str
    machine: str
    load: float
    # Files of earlier releases have the second of these keys.
    details: Annotated[Mapping[str, float], Field(validation_alias=AliasChoices("details", "told"))] = field(
        default_factory=dict
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """Text lengths of each mixture, and the measurements."""

    benchmark: Literal["throughput", "calibration"]  # Files of earlier releases have "calibration".
    texts: Mapping[str, tuple[TextLengths, ...]]
    measurements: tuple[Measurement, ...]

    def lengths_of(self, mixture: str) -> tuple[TextLengths, ...]:
        """The text lengths of a mixture; raises ConfigError if they were not measured."""
        if not self.texts.get(mixture):
            raise ConfigError(f"plan: the measured speeds have no text lengths of {mixture}; {REMEDY}")
        return self.texts[mixture]

    def find(self, step: Step, unit: Unit, *, hardware: str, subject: str) -> Measurement | None:
        """The measurement, or None if there is none."""
        key = (step, unit, hardware, subject)
        return next((m for m in self.measurements if (m.step, m.unit, m.hardware, m.subject) == key), None)

    def need(self, step: Step, unit: Unit, *, hardware: str, subject: str) -> Measurement:
        """The measurement; if there is none, raises ConfigError with what is missing and what was measured."""
        measurement = self.find(step, unit, hardware=hardware, subject=subject)
        if measurement is None:
            others = [m.subject for m in self.measurements if (m.step, m.unit, m.hardware) == (step, unit, hardware)]
            available = f"measured on {hardware}: {', '.join(others) or 'nothing'}"
            raise ConfigError(
                f"plan: {step} of {subject}, in {unit}, was not measured on {hardware} ({available}); {REMEDY}"
            )
        return measurement


def read_throughput(path: Path) -> Throughput:
    """Reads a file of measured speeds; raises ConfigError if it is missing, damaged or has impossible values."""
    if not path.is_file():
        raise ConfigError(f"plan: {path}: no such file of measured speeds; {REMEDY}")
    try:
        throughput = TypeAdapter(Throughput).validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        first_error = error.errors()[0]
        field_path = ".".join(map(str, first_error["loc"]))
        raise ConfigError(
            f"plan: {path}: is not a file of measured speeds ({field_path or 'file'}: {first_error['msg']}); {REMEDY}"
        ) from error
    invalid = next((m for m in throughput.measurements if not 0 < m.value < float("inf")), None)
    if invalid:
        value = f"{invalid.step} of {invalid.subject} is {invalid.value} {invalid.unit}, not a positive number"
        raise ConfigError(f"plan: {path}: {value}; {REMEDY}")
    return throughput
