"""`cappy pipeline`: compiles and runs the Kubeflow pipelines; `pipelines` is only imported inside the verbs."""

import importlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cappy.cli.flags import FreshFlag, JsonFlag, NoChecksFlag, SettingFlag, new_run_name
from cappy.errors import ConfigError, quote

if TYPE_CHECKING:
    from pipelines.definitions import Settings
    from pipelines.local import RunOutcome
    from pipelines.recipe import Platform, Recipe

INSTALL_COMMAND = "pip install -e '.[pipelines]'"
PIPELINE_NAMES = ("adapt", "pretrain", "evaluate", "batch_score")

app = typer.Typer(help="Compile, run, submit and follow the Kubeflow pipelines.", no_args_is_help=True)

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A recipe (YAML file), or adapt, pretrain, evaluate, batch_score.", show_default=False
    ),
]
ShardsFlag = Annotated[
    int | None,
    typer.Option(min=1, help="Number of shards for sampling or scoring.", show_default="the recipe's, else 1"),
]
TrackingUriFlag = Annotated[
    str,
    typer.Option(
        "--tracking-uri",
        help="MLflow's address.",
        show_default="the recipe's, else MLFLOW_TRACKING_URI, else .cappy/mlflow.db",
    ),
]
WorkFlag = Annotated[
    Path | None,
    typer.Option(
        "--work", help="Folder of unfinished and finished work.", show_default="the recipe's, else .cappy/work"
    ),
]


@app.command()
def run(
    recipe: RecipeArgument,
    on: Annotated[
        Literal["local", "docker"], typer.Option(help="Run steps as processes, or in containers of the images.")
    ] = "local",
    setting: SettingFlag = [],  # noqa: B006 (typer needs the default and copies it)
    fresh: FreshFlag = False,
    shards: ShardsFlag = None,
    tracking_uri: TrackingUriFlag = "",
    work: WorkFlag = None,
    no_checks: NoChecksFlag = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the graph and its resources; run nothing.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Run a pipeline on this machine with Kubeflow's local runner."""
    chosen = load_recipe(recipe, setting, shards=shards, tracking_uri=tracking_uri, work=work, fresh=fresh)
    if dry_run:
        print_preview(chosen, on, as_json)
        return
    run_and_print(chosen, on, as_json, checks=not no_checks)


@app.command("compile")
def compile_pipeline(
    recipe: RecipeArgument,
    on: Annotated[
        Literal["local", "docker", "kubeflow", "vertex"], typer.Option(help="Platform to compile for.")
    ] = "local",
    setting: SettingFlag = [],  # noqa: B006 (as above)
    shards: ShardsFlag = None,
    target: Annotated[
        Path | None, typer.Option(help="YAML file to write.", show_default="none: standard output")
    ] = None,
) -> None:
    """Write a pipeline as YAML for Kubeflow and Vertex AI."""
    chosen = load_recipe(recipe, setting, shards=shards)
    if chosen.parameters or chosen.settings:
        load("pipelines.planning").check_settings(chosen, on)
    if target is not None and Path(recipe).is_file() and target.resolve() == Path(recipe).resolve():
        raise ConfigError(f"--target: {target} is the recipe itself; choose another file")
    text = load("pipelines.builder").compile_pipeline(chosen, on)
    if target is None:
        typer.echo(text, nl=False)
        return
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error.strerror}); choose another --target") from error
    typer.echo(f"{target}: pipeline {chosen.pipeline} for {on}")


def load_recipe(
    text: str,
    assignments: Sequence[str] = (),
    *,
    shards: int | None = None,
    tracking_uri: str = "",
    work: Path | None = None,
    fresh: bool = False,
) -> "Recipe":
    """The recipe in a file, or the default recipe of a pipeline, with the values of flags."""
    recipes = load("pipelines.recipe")
    chosen: Recipe
    if text in PIPELINE_NAMES:
        chosen = recipes.check_recipe({"pipeline": text})
    elif Path(text).suffix in (".yaml", ".yml") or Path(text).is_file():
        chosen = recipes.read_recipe(Path(text))
    else:
        names = ", ".join(PIPELINE_NAMES)
        raise typer.BadParameter(
            f"{quote(text)} is neither a recipe file nor a pipeline; choose one of {names}", param_hint="RECIPE"
        )
    if shards is not None:
        limit = load("pipelines.definitions").MAX_SHARDS
        if shards > limit:
            raise ConfigError(f"--shards: {shards} is too many; give at most {limit}")
        chosen = replace(chosen, shards=shards)
    settings = {step: dict(values) for step, values in chosen.settings.items()}
    for step, values in settings_by_step(chosen.pipeline, assignments, chosen.steps).items():
        settings.setdefault(step, {}).update(values)
    chosen = replace(
        chosen,
        settings=settings,
        tracking_uri=tracking_uri or chosen.tracking_uri,
        work=str(work) if work else chosen.work,
    )
    return with_fresh(chosen) if fresh else chosen


def with_fresh(recipe: "Recipe") -> "Recipe":
    """The recipe with a new run name as `fresh` of every step: the run redoes its steps, and retries continue it."""
    name = new_run_name()
    settings = {step: {**recipe.settings.get(step, {}), "fresh": name} for step in recipe.steps}
    return replace(recipe, settings=settings)


def settings_by_step(name: str, assignments: Sequence[str], steps: Sequence[str] = ()) -> "Settings":
    """Parses STEP.SETTING=VALUE texts into settings by step; a value is JSON if it can be parsed as such, else text."""
    steps = steps or load("pipelines.definitions").PIPELINES[name].steps
    settings: Settings = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        step, dot, setting = path.partition(".")
        if not equals or not dot or not setting:
            raise typer.BadParameter(f"{quote(assignment)} is not STEP.SETTING=VALUE", param_hint="--set")
        if step not in steps:
            raise typer.BadParameter(
                f"{name} has no step {quote(step)}; choose one of {', '.join(steps)}", param_hint="--set"
            )
        if setting == "fresh":
            raise typer.BadParameter("fresh applies to the whole run; give --fresh", param_hint="--set")
        settings.setdefault(step, {})[setting.replace("-", "_")] = _parse_value(text)
    return settings


def run_and_print(recipe: "Recipe", on: Literal["local", "docker"], as_json: bool, *, checks: bool = True) -> None:
    """Checks a recipe, runs it on this machine and prints the result; without `checks` only the recipe is checked."""
    load("pipelines.checks" if checks else "pipelines.planning").check(recipe, on)
    images: dict[str, str] = {}
    if on == "docker":
        load("pipelines.local").check_secrets(recipe)
        images = load("pipelines.local").check_images(recipe)
    outcome = load("pipelines.local").run_recipe(recipe, on, images=images)
    if recipe.pipeline == "batch_score":
        _print_scored(outcome, as_json)
    else:
        _print_outcome(outcome, recipe.tracking_uri, as_json)


def _print_scored(outcome: "RunOutcome", as_json: bool) -> None:
    """Prints the folder of the scored records."""
    from cappy.records import read_manifest

    folder = outcome.outputs.get("gathering") or outcome.outputs["scoring"]
    manifest = read_manifest(folder)
    version = str(manifest.config.get("version", ""))
    values = {"run": outcome.run_id, "scored": str(folder), "candidates": manifest.candidates, "version": version}
    if as_json:
        typer.echo(json.dumps(values, indent=1))
        return
    content = f"{manifest.rows:,} instances, {manifest.candidates:,} candidates, scored by {version}"
    typer.echo(f"scored    {folder}\n          {content}")


def _print_outcome(outcome: "RunOutcome", tracking_uri: str, as_json: bool) -> None:
    from cappy.cli.outcome import describe, facts

    values = facts(outcome, tracking_uri)
    typer.echo(json.dumps(values, indent=1, ensure_ascii=False) if as_json else describe(outcome, values))


def print_preview(recipe: "Recipe", on: "Platform", as_json: bool) -> None:
    """Checks a recipe and prints a preview of its run."""
    load("pipelines.builder").build(recipe, on)
    preview = load("pipelines.preview")
    load("pipelines.planning").check(recipe, on)
    typer.echo(json.dumps(preview.to_json(recipe, on), indent=1) if as_json else preview.to_text(recipe, on))


def print_estimate(recipe: "Recipe", as_json: bool) -> None:
    """Checks a recipe and prints what its sampling takes, and the time of other steps as far as it was measured."""
    from cappy.sampling.estimate import describe, to_values
    from cappy.sampling.step import SamplingConfig, endpoint_config

    planning, preview = load("pipelines.planning"), load("pipelines.preview")
    planning.check(recipe, "local")
    configs = planning.configs_of(recipe)
    estimates = preview.estimate_sampling(configs)
    count = max((each.instances for each in estimates or ()), default=0)
    seconds = preview.measured_seconds(configs, planning.work_of(recipe, "local"), count)
    if as_json:
        sampling = None if estimates is None else to_values(estimates)
        typer.echo(json.dumps({"sampling": sampling, "seconds": seconds}, indent=1))
        return
    sampling_config = configs["sampling"]
    assert isinstance(sampling_config, SamplingConfig)  # noqa: S101 (its config class)
    if estimates is None:
        text = "sampling: not estimated; its instances are known only after preparation: run cappy preparation, then "
        text += "cappy sampling --estimate"
    else:
        no_llm = "sampling: no LLM, so no requests and no cost"
        text = describe(estimates, endpoint_config(sampling_config)) if estimates else no_llm
    typer.echo("\n".join([text, *preview.describe_seconds(recipe.steps, seconds)]))


def load(name: str) -> ModuleType:
    """Imports a module of `pipelines`. Raises ConfigError if kfp is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "kfp":
            raise
        raise ConfigError(f"kfp is not installed; install the pipelines extra: {INSTALL_COMMAND}") from error


def _parse_value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text
