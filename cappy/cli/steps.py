"""The nine step verbs: flags from the config class, the step's own `run`, one line at the end."""

import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from cappy.cli.flags import parameters
from cappy.cli.progress_line import ProgressLine
from cappy.config import build
from cappy.progress import Progress
from cappy.records import Manifest
from cappy.steps import config_class, runner

JSON_FLAG = Annotated[bool, typer.Option("--json", help="Print the manifest as JSON instead of a line.")]


def step_command(step: str, text: str) -> Any:
    """The command of a step."""
    return make_command(step, text, config_class(step), runner(step))


def make_command(step: str, text: str, settings: type[Any], run: Callable[[Any, Progress], Manifest]) -> Any:
    """A command whose flags are the fields of `settings` and which calls `run` with them."""

    def verb(*, as_json: bool, **values: Any) -> None:
        started = time.monotonic()
        config = build(settings, values)
        with ProgressLine(f"cappy {step}") as progress:
            manifest = run(config, progress)
        typer.echo(manifest.to_json() if as_json else summary(manifest, config.target, time.monotonic() - started))

    as_json = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, annotation=JSON_FLAG, default=False)
    signature = inspect.Signature([*parameters(settings), as_json])
    verb.__signature__ = signature  # type: ignore[attr-defined]
    verb.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    single.command(step, help=text)(verb)
    return typer.main.get_command(single)


def summary(manifest: Manifest, target: Path, seconds: float) -> str:
    """What was written, where, and how long it took, in one line."""
    if manifest.rows:
        content = f"{manifest.rows:,} instances with {manifest.candidates:,} candidates"
    else:
        content = f"{len(manifest.files)} files"
    numbers = ", ".join(
        f"{name} {value:,.6g}" for name, value in manifest.metrics.items() if name not in ("instances", "candidates")
    )
    return f"{target}: {content}{numbers and f'; {numbers}'} (manifest {manifest.hash[:12]}, {seconds:.1f} s)"
