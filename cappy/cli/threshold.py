"""`cappy threshold`: which score keeps the picks good enough?"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def threshold(
    report: Annotated[Path, typer.Option(help="Folder of an evaluation.")],
    precision: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of good picks wanted, 0 to 1.")] = 0.9,
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
    from cappy.evaluation.threshold import sentence
    from cappy.evaluation.threshold import threshold as find

    found = find(report, precision=precision, good=good, confidence=confidence)
    typer.echo(
        json.dumps(asdict(found) if found else None)
        if as_json
        else sentence(found, precision=precision, good=good, confidence=confidence)
    )
