"""`cappy plan`: what a pretraining will take, before anything is started."""

import inspect
import json
from typing import Any

import typer

from cappy.cli.flags import JsonFlag, make_command, parameters
from cappy.config import build

HELP = """Print rows, tokens, GPU-hours, storage and wall-clock of a pretraining, step by step.

Speeds are measured ones. Where none were measured, the plan asks for the share of the data sheet's peak to assume,
and says so. docs/scale.md shows the plan of the paper's pretraining.
"""


def plan_command() -> Any:
    """The command: its flags are the fields of `PlanConfig`."""
    from cappy.costing import PlanConfig

    as_json = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, annotation=JsonFlag, default=False)
    return make_command("plan", HELP, _print_plan, [*parameters(PlanConfig), as_json])


def _print_plan(*, as_json: bool, **values: Any) -> None:
    from cappy.costing import PlanConfig
    from cappy.costing.calibration import DEFAULT, read_calibration
    from cappy.costing.plan import make_plan, text, to_values

    config = build(PlanConfig, values)
    plan = make_plan(config, read_calibration(config.calibration or DEFAULT))
    typer.echo(json.dumps(to_values(plan), indent=1) if as_json else text(plan))
