"""`cappy plan`: what a pretraining will take, before anything is started."""

import json
import math
from pathlib import Path
from typing import Annotated

import typer


def plan(
    hardware: Annotated[
        str, typer.Option(help="What it runs on: cpu (a device is a core), or a GPU such as h100, a100, l4.")
    ],
    mixture: Annotated[str, typer.Option(help="Datasets to pretrain on: t0.")] = "t0",
    generators: Annotated[
        list[str] | None,
        typer.Option(
            metavar="<name>",
            help="LLM whose responses are sampled, and how many for a prompt, as bart0:5 (repeatable).",
            show_default="bart0:5 and t0-3b:5, the paper's",
        ),
    ] = None,
    gpus: Annotated[
        list[int] | None,
        typer.Option(
            metavar="<number>",
            help="Devices, 1 to 256; a column for each number (repeatable).",
            show_default="1, 8, 64 and 256",
        ),
    ] = None,
    scorer: Annotated[
        str, typer.Option(help="Shape of the scorer: builtin, mini, roberta-base, roberta-large.")
    ] = "roberta-large",
    epochs: Annotated[float, typer.Option(min=0.001, help="Passes over the rows.")] = 1.0,
    validation: Annotated[
        float, typer.Option(min=0, max=0.5, help="Share of the instances that checks score instead.")
    ] = 0.002,
    workers: Annotated[
        int, typer.Option(min=1, max=4096, help="CPU cores for preparation and annotation, beside GPUs.")
    ] = 16,
    mfu: Annotated[
        float | None,
        typer.Option(
            help="Share of the data sheet's peak that training and scoring reach: an assumption, where not measured.",
            show_default="none",
        ),
    ] = None,
    sampling_mfu: Annotated[
        float | None, typer.Option(help="The same of sampling, whose tokens come one at a time.", show_default="none")
    ] = None,
    scaling: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of linear speed that training keeps on several devices.")
    ] = 1.0,
    price: Annotated[
        float | None, typer.Option(min=0, help="Money for a device-hour; none is built in.", show_default="none")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="File of measured speeds, written by benchmarks/calibration.py.",
            show_default="benchmarks/results/calibration.json of this clone",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Print rows, tokens, GPU-hours, storage and wall-clock of a pretraining, step by step.

    Speeds are measured ones. Where none were measured, the plan asks for the share of the data sheet's peak to assume,
    and says so. docs/scale.md shows the plan of the paper's pretraining.
    """
    from cappy.errors import ConfigError
    from cappy.plan import Terms, make_plan, read_calibration, text, to_values
    from cappy.plan.calibration import DEFAULT

    for flag, number in (("--epochs", epochs), ("--price", price)):
        if number is not None and not math.isfinite(number):
            raise ConfigError(f"plan: {flag}: {number} is no number to reckon with; give a finite one")
    for flag, share in (("--mfu", mfu), ("--sampling-mfu", sampling_mfu)):
        if share is not None and not 0 < share <= 1:
            raise ConfigError(f"plan: {flag}: {share:g} is no share of a peak; give one above 0 and at most 1")
    terms = Terms(
        scorer=scorer,
        epochs=epochs,
        validation=validation,
        workers=workers,
        mfu=mfu,
        sampling_mfu=sampling_mfu,
        scaling=scaling,
    )
    made = make_plan(
        mixture,
        generators or ["bart0:5", "t0-3b:5"],
        hardware,
        gpus or [1, 8, 64, 256],
        read_calibration(calibration or DEFAULT),
        terms,
        price=price,
    )
    typer.echo(json.dumps(to_values(made), indent=1) if as_json else text(made))
