"""The verbs `threshold`, `convert`, `templates` and `plan`."""

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
    min_precision: Annotated[float, typer.Option(min=0.0, max=1.0, help="Required share of good picks, 0 to 1.")] = 0.9,
    good: Annotated[float, typer.Option(min=0.0, max=1.0, help="Minimum label of a good pick, 0 to 1.")] = 0.5,
    confidence: Annotated[
        float, typer.Option(min=0.5, max=0.999, help="Confidence that the precision is reached.")
    ] = 0.95,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Find the score above which the scorer's picks have the required precision.

    The threshold is chosen on the held-out instances, so that the lower confidence bound of the precision is at least
    --min-precision, and tested on the reported instances; a cross-fitted report uses the out-of-fold instances for
    both. Below the threshold, abstain: none of the responses is good enough.
    """
    from cappy.evaluation.threshold import describe_threshold, find_threshold

    result = find_threshold(report, precision=min_precision, good=good, confidence=confidence)
    typer.echo(
        json.dumps(asdict(result) if result else None)
        if as_json
        else describe_threshold(result, precision=min_precision, good=good, confidence=confidence)
    )


def threshold_command() -> TyperCommand:
    """The command, with the old name of a flag."""
    flags = list(inspect.signature(threshold).parameters.values())
    return make_command(
        "threshold", inspect.getdoc(threshold) or "", threshold, flags, {"--precision": "--min-precision"}
    )


def convert(
    source: Annotated[
        str, typer.Option(help="Folder with pytorch_model.bin, config.json and tokenizer, or hub:org/name@revision.")
    ],
    target: Annotated[Path, typer.Option(help="Scorer folder to write.")],
    sha256: Annotated[str, typer.Option(help="The sha256 of pytorch_model.bin; other files are rejected.")],
) -> None:
    """Turn a published PyTorch checkpoint into a scorer folder.

    Reads only tensors and runs none of its code; every weight must match the model. Writes safetensors.
    """
    from cappy.scoring.conversion import convert as convert_checkpoint

    manifest = convert_checkpoint(source, target, sha256=sha256)
    typer.echo(f"{target}: wrote a scorer as safetensors from the verified checkpoint (manifest {manifest.hash[:12]})")


def templates(
    target: Annotated[Path, typer.Option(help="Folder to write; give it to preparation with --templates.")],
    url: Annotated[
        str | None,
        typer.Option(help="Archive (.tar.gz) of the repository, if GitHub is not reachable.", show_default="GitHub"),
    ] = None,
) -> None:
    """Download PromptSource's templates (Apache-2.0) and verify the sha256 of every file."""
    from cappy.preparation.templates import URL, fetch

    count = fetch(target, url=url or URL)
    typer.echo(f"{target}: {count} template files, sha256 verified")


HELP = """Print rows, tokens, GPU-hours, storage and wall-clock time of a pretraining run, step by step.

Speeds are measured. If your hardware was not measured, give an assumed MFU (share of the data sheet's peak FLOP/s;
--mfu, --sampling-mfu); the plan marks it as assumed. docs/scale.md shows the plan of the paper's pretraining.
"""


def plan_command() -> TyperCommand:
    """The command: its flags are the fields of `PlanConfig`."""
    from cappy.costing import PlanConfig

    as_json = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, annotation=JsonFlag, default=False)
    return make_command("plan", HELP, _print_plan, [*parameters(PlanConfig), as_json], renamed_flags(PlanConfig))


def _print_plan(*, as_json: bool, **values: object) -> None:
    from cappy.costing import DEFAULT_THROUGHPUT_PATH, PlanConfig, read_throughput
    from cappy.costing.plan import make_plan, text, to_values

    config = build(PlanConfig, values)
    plan = make_plan(config, read_throughput(config.throughput or DEFAULT_THROUGHPUT_PATH))
    typer.echo(json.dumps(to_values(plan), indent=1) if as_json else text(plan))
