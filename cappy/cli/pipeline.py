"""`cappy pipeline`: compile and run the Kubeflow pipelines; `pipelines` is imported inside the verbs alone."""

import importlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cappy.cli.flags import FreshFlag, JsonFlag, SettingFlag, new_run_name
from cappy.errors import ConfigError, quote

if TYPE_CHECKING:
    from pipelines.definitions import Settings
    from pipelines.local import Outcome
    from pipelines.recipe import Platform, Recipe

EXTRA = "pip install -e '.[pipelines]'"
NAMES = ("adapt", "pretrain", "evaluate", "batch_score")

app = typer.Typer(help="Compile, run, submit and follow the Kubeflow pipelines.", no_args_is_help=True)

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A recipe (YAML file), or adapt, pretrain, evaluate, batch_score.", show_default=False
    ),
]
ShardsFlag = Annotated[
    int | None,
    typer.Option(min=1, help="Shards that samples or scores are computed in.", show_default="the recipe's, else 1"),
]
AddressFlag = Annotated[
    str,
    typer.Option(
        "--tracking-uri", help="MLflow's address.", show_default="the recipe's, else as `cappy adapt` takes it"
    ),
]
PlaceFlag = Annotated[
    Path | None,
    typer.Option(
        "--work", help="Folder that keeps unfinished and finished work.", show_default="the recipe's, else .cappy/work"
    ),
]


@app.command()
def run(
    recipe: RecipeArgument,
    on: Annotated[
        Literal["local", "docker"], typer.Option(help="In processes, or in the images' containers.")
    ] = "local",
    setting: SettingFlag = [],  # noqa: B006 (typer needs the default and copies it)
    fresh: FreshFlag = False,
    shards: ShardsFlag = None,
    tracking_uri: AddressFlag = "",
    work: PlaceFlag = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the graph and what it takes; run nothing.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Run a pipeline on this machine, on Kubeflow's local runner."""
    chosen = recipe_of(recipe, setting, shards=shards, tracking_uri=tracking_uri, work=work, fresh=fresh)
    if dry_run:
        print_preview(chosen, on, as_json)
        return
    run_and_print(chosen, on, as_json)


@app.command("compile")
def compile_pipeline(
    recipe: RecipeArgument,
    on: Annotated[
        Literal["local", "docker", "kubeflow", "vertex"], typer.Option(help="Platform whose settings are written in.")
    ] = "local",
    setting: SettingFlag = [],  # noqa: B006 (as above)
    shards: ShardsFlag = None,
    target: Annotated[
        Path | None, typer.Option(help="YAML file to write.", show_default="none: standard output")
    ] = None,
) -> None:
    """Write a pipeline as the YAML that Kubeflow and Vertex AI take."""
    chosen = recipe_of(recipe, setting, shards=shards)
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


def recipe_of(
    text: str,
    pairs: Sequence[str] = (),
    *,
    shards: int | None = None,
    tracking_uri: str = "",
    work: Path | None = None,
    fresh: bool = False,
) -> "Recipe":
    """The recipe of a file, or of a pipeline's name alone, with what flags say in place of it."""
    recipes = load("pipelines.recipe")
    chosen: Recipe
    if text in NAMES:
        chosen = recipes.check_recipe({"pipeline": text})
    elif Path(text).suffix in (".yaml", ".yml") or Path(text).is_file():
        chosen = recipes.read_recipe(Path(text))
    else:
        names = ", ".join(NAMES)
        raise typer.BadParameter(f"{quote(text)} is neither a recipe nor a pipeline: {names}", param_hint="RECIPE")
    if shards is not None:
        limit = load("pipelines.definitions").MAX_SHARDS
        if shards > limit:
            raise ConfigError(f"--shards: {shards} are too many for a graph; give at most {limit}")
        chosen = replace(chosen, shards=shards)
    settings = {step: dict(values) for step, values in chosen.settings.items()}
    for step, values in per_step(chosen.pipeline, pairs, chosen.steps).items():
        settings.setdefault(step, {}).update(values)
    chosen = replace(
        chosen,
        settings=settings,
        tracking_uri=tracking_uri or chosen.tracking_uri,
        work=str(work) if work else chosen.work,
    )
    return with_fresh(chosen) if fresh else chosen


def with_fresh(recipe: "Recipe") -> "Recipe":
    """The recipe of a run that does every step again, and continues its own work where a step is retried."""
    name = new_run_name()
    settings = {step: {**recipe.settings.get(step, {}), "fresh": name} for step in recipe.steps}
    return replace(recipe, settings=settings)


def per_step(name: str, pairs: Sequence[str], steps: Sequence[str] = ()) -> "Settings":
    """STEP.SETTING=VALUE words as settings by step; a value is JSON where it reads as such, else text."""
    steps = steps or load("pipelines.definitions").PIPELINES[name].steps
    settings: Settings = {}
    for pair in pairs:
        path, equals, text = pair.partition("=")
        step, dot, setting = path.partition(".")
        if not equals or not dot or not setting:
            raise typer.BadParameter(f"{quote(pair)} is not STEP.SETTING=VALUE", param_hint="--set")
        if step not in steps:
            raise typer.BadParameter(f"{name} has no step {quote(step)}: {', '.join(steps)}", param_hint="--set")
        if setting == "fresh":
            raise typer.BadParameter("fresh is for the whole run; give --fresh", param_hint="--set")
        settings.setdefault(step, {})[setting.replace("-", "_")] = _value(text)
    return settings


def run_and_print(recipe: "Recipe", on: Literal["local", "docker"], as_json: bool) -> None:
    """Checks a recipe, runs it on this machine, then prints what came of it."""
    load("pipelines.planning").check(recipe, on)
    images: dict[str, str] = {}
    if on == "docker":
        load("pipelines.local").check_secrets(recipe)
        images = load("pipelines.local").check_images(recipe)
    outcome = load("pipelines.local").run_recipe(recipe, on, images=images)
    if recipe.pipeline == "batch_score":
        _print_scored(outcome, as_json)
    else:
        _print_outcome(outcome, recipe.tracking_uri, as_json)


def _print_scored(outcome: "Outcome", as_json: bool) -> None:
    """Prints where the scored records lie."""
    from cappy.records import read_manifest

    folder = outcome.outputs.get("gathering") or outcome.outputs["scoring"]
    manifest = read_manifest(folder)
    version = str(manifest.config.get("version", ""))
    values = {"run": outcome.run_id, "scored": str(folder), "candidates": manifest.candidates, "version": version}
    if as_json:
        typer.echo(json.dumps(values, indent=1))
        return
    content = f"{manifest.rows:,} instances, {manifest.candidates:,} candidates, scores under {version}"
    typer.echo(f"scored    {folder}\n          {content}")


def _print_outcome(outcome: "Outcome", tracking_uri: str, as_json: bool) -> None:
    from cappy.cli.outcome import describe, facts

    values = facts(outcome, tracking_uri)
    typer.echo(json.dumps(values, indent=1, ensure_ascii=False) if as_json else describe(outcome, values))


def print_preview(recipe: "Recipe", on: "Platform", as_json: bool) -> None:
    """Prints what the run would be, once everything that can be checked before it is."""
    load("pipelines.builder").build(recipe, on)
    preview = load("pipelines.preview")
    load("pipelines.planning").check(recipe, on)
    typer.echo(json.dumps(preview.to_json(recipe, on), indent=1) if as_json else preview.to_text(recipe, on))


def load(name: str) -> ModuleType:
    """A module of `pipelines`; ConfigError where kfp is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "kfp":
            raise
        raise ConfigError(f"kfp is not installed; install the pipelines extra: {EXTRA}") from error


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text
