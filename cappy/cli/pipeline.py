"""`cappy pipeline`: compile and run the Kubeflow pipelines; `pipelines` is imported inside the verbs alone."""

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import typer

from cappy.cli.adapt import JsonFlag, SettingFlag, TrackingFlag, WorkFlag
from cappy.errors import ConfigError, shown

EXTRA = "pip install -e '.[pipelines]'"

app = typer.Typer(help="Compile and run the Kubeflow pipelines.", no_args_is_help=True)

Name = Annotated[Literal["adapt", "pretrain"], typer.Argument(help="Pipeline.", show_default=False)]


@app.command()
def run(
    name: Name,
    setting: SettingFlag = [],  # noqa: B006 (typer needs the default and copies it)
    tracking_uri: TrackingFlag = "",
    work: WorkFlag = Path(".cappy/work"),
    as_json: JsonFlag = False,
) -> None:
    """Run a pipeline on this machine, on Kubeflow's local runner."""
    choices = {"tracking_uri": tracking_uri, "settings": per_step(name, setting)}
    run_and_tell(name, choices, work=work, tracking_uri=tracking_uri, as_json=as_json)


@app.command("compile")
def compile_pipeline(
    name: Name,
    target: Annotated[
        Path | None, typer.Option(help="YAML file to write.", show_default="none: standard output")
    ] = None,
) -> None:
    """Write a pipeline as the YAML that Kubeflow and Vertex AI take."""
    text = _module("pipelines.compile").compiled(name)
    if target is None:
        typer.echo(text, nl=False)
        return
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error.strerror}); choose another --target") from error
    typer.echo(f"{target}: pipeline {name}")


def per_step(name: str, pairs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """STEP.SETTING=VALUE words as settings by step; a value is JSON where it reads as such, else text."""
    steps = importlib.import_module("pipelines").STEPS[name]
    settings: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        path, equals, text = pair.partition("=")
        step, dot, setting = path.partition(".")
        if not equals or not dot or not setting:
            raise typer.BadParameter(f"{shown(pair)} is not STEP.SETTING=VALUE", param_hint="--set")
        if step not in steps:
            raise typer.BadParameter(f"{name} has no step {shown(step)}: {', '.join(steps)}", param_hint="--set")
        settings.setdefault(step, {})[setting.replace("-", "_")] = _value(text)
    return settings


def run_and_tell(name: str, choices: Mapping[str, Any], *, work: Path, tracking_uri: str, as_json: bool) -> None:
    """Plans and runs a pipeline, then prints what came of it."""
    from cappy.cli.outcome import facts, told

    steps = _module(f"pipelines.{name}").plan(**choices)
    outcome = _module("pipelines.local").run_pipeline(name, steps, work=work, show=True)
    found = facts(outcome, tracking_uri)
    typer.echo(json.dumps(found, indent=1, ensure_ascii=False) if as_json else told(outcome, found))


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "kfp":
            raise
        raise ConfigError(f"kfp is not installed; install the pipelines extra: {EXTRA}") from error


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
