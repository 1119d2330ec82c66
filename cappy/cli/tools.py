"""Verbs for one job each: the plan of a pretraining, a threshold for picks, checkpoints as scorers, templates."""

import inspect
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from cappy.cli.flags import JsonFlag, make_command, parameters
from cappy.config import build, renamed_flags


def threshold(
    report: Annotated[Path, typer.Option(help="Folder of an evaluation.")],
    min_precision: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Least share of good picks wanted, 0 to 1.")
    ] = 0.9,
    good: Annotated[float, typer.Option(min=0.0, max=1.0, help="Label from which a pick is good, 0 to 1.")] = 0.5,
    confidence: Annotated[
        float, typer.Option(min=0.5, max=0.999, help="Probability with which the precision is kept.")
    ] = 0.95,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Find the score above which the scorer's picks are good with the wanted precision.

    It is chosen on the held-out instances by a lower bound, so that the precision is kept with --confidence, and tried
    on the reported ones; in a cross-fitted report both are the out-of-fold ones. Below it, abstain: none of the
    responses is good enough.
    """
    from cappy.evaluation.threshold import describe_threshold, find_threshold

    answer = find_threshold(report, precision=min_precision, good=good, confidence=confidence)
    typer.echo(
        json.dumps(asdict(answer) if answer else None)
        if as_json
        else describe_threshold(answer, precision=min_precision, good=good, confidence=confidence)
    )


def threshold_command() -> TyperCommand:
    """The command, which knows the name that a flag had."""
    flags = list(inspect.signature(threshold).parameters.values())
    return make_command(
        "threshold", inspect.getdoc(threshold) or "", threshold, flags, {"--precision": "--min-precision"}
    )


def convert(
    source: Annotated[
        str, typer.Option(help="Folder with pytorch_model.bin, config.json and tokenizer, or hub:org/name@revision.")
    ],
    target: Annotated[Path, typer.Option(help="Scorer folder to write.")],
    sha256: Annotated[str, typer.Option(help="The sha256 of pytorch_model.bin; a file with another one is not read.")],
) -> None:
    """Turn a published PyTorch checkpoint into a scorer folder.

    The file is read as tensors alone, none of its code runs; every weight must have its place. Out come safetensors.
    """
    from cappy.scoring.conversion import convert as converted

    manifest = converted(source, target, sha256=sha256)
    typer.echo(
        f"{target}: a scorer as safetensors, from the checkpoint with that sha256 (manifest {manifest.hash[:12]})"
    )


def templates(
    target: Annotated[Path, typer.Option(help="Folder to make; --templates of preparation names it.")],
    url: Annotated[
        str | None,
        typer.Option(help="Archive (.tar.gz) of the repository, where GitHub is not at hand.", show_default="GitHub"),
    ] = None,
) -> None:
    """Fetch PromptSource's templates (Apache-2.0) and check the sha256 of every file."""
    from cappy.preparation.templates import URL, fetch

    count = fetch(target, url=url or URL)
    typer.echo(f"{target}: {count} files of templates, each with its known sha256")


HELP = """Print rows, tokens, GPU-hours, storage and wall-clock of a pretraining, step by step.

Speeds are measured ones. Where none were measured, the plan asks for the share of the data sheet's peak to assume,
and says so. docs/scale.md shows the plan of the paper's pretraining.
"""


def plan_command() -> TyperCommand:
    """The command: its flags are the fields of `PlanConfig`."""
    from cappy.costing import PlanConfig

    as_json = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, annotation=JsonFlag, default=False)
    return make_command("plan", HELP, _print_plan, [*parameters(PlanConfig), as_json], renamed_flags(PlanConfig))


def _print_plan(*, as_json: bool, **values: object) -> None:
    from cappy.costing import DEFAULT, PlanConfig, read_throughput
    from cappy.costing.plan import make_plan, text, to_values

    config = build(PlanConfig, values)
    plan = make_plan(config, read_throughput(config.throughput or DEFAULT))
    typer.echo(json.dumps(to_values(plan), indent=1) if as_json else text(plan))
