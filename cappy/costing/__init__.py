"""The scale plan: rows, tokens, GPU-hours, storage and wall-clock of a pretraining, computed from measured speeds.

`cappy plan` prints it. Volumes are arithmetic over a mixture's facts (`volumes`), speeds come from the calibration
file that `benchmarks/calibration.py` writes (`calibration`), work is counted in floating point operations of published
shapes (`costs`). A speed that nobody measured is never made up: it is a share of the data sheet's peak that the user
states, and the plan says so.
"""

import math
from pathlib import Path
from typing import Annotated

from pydantic import Field

from cappy.config import settings
from cappy.errors import ConfigError

MAX_DEVICES = 256


@settings
class PlanConfig:
    """What is planned, and what is assumed: each a flag of `cappy plan`."""

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
    calibration: Annotated[
        Path | None,
        Field(
            description="File of measured speeds, written by benchmarks/calibration.py; left out: that of this clone"
        ),
    ] = None

    def __post_init__(self) -> None:
        for flag, number in (("--epochs", self.epochs), ("--price", self.price)):
            if number is not None and not math.isfinite(number):
                raise ConfigError(f"plan: {flag}: {number} is no number to reckon with; give a finite one")
        for flag, share in (("--mfu", self.mfu), ("--sampling-mfu", self.sampling_mfu)):
            if share is not None and not 0 < share <= 1:
                raise ConfigError(f"plan: {flag}: {share:g} is no share of a peak; give one above 0 and at most 1")
        wrong = next((number for number in self.gpus if not 1 <= number <= MAX_DEVICES), None)
        if wrong is not None:
            raise ConfigError(f"plan: --gpus: {wrong} is out of range; give 1 to {MAX_DEVICES}, repeated to compare")
