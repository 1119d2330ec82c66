"""`cappy adapt`: the pipeline that most people want, on this machine."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import Field
from typer.core import TyperCommand

from cappy.cli.flags import FreshFlag, JsonFlag, SettingFlag, make_command, parameters
from cappy.config import ADVANCED, DEFAULT_WORK, Work, build, settings
from cappy.errors import ConfigError

if TYPE_CHECKING:
    from pipelines.recipe import Recipe

BUILTIN = "builtin"
FORMS = "builtin, a JSON Lines, CSV or Parquet file, or a folder of records"


@settings
class AdaptConfig:
    """What a person says of an adaptation; every other setting of a step goes by `--set`."""

    instances: Annotated[str, Field(description=f"Your task: {FORMS}")] = BUILTIN
    columns: Annotated[
        tuple[str, ...],
        Field(description="Column of your file that holds a field: FIELD=COLUMN, such as instruction=question"),
    ] = ()
    generator: Annotated[
        tuple[str, ...],
        Field(
            description="LLM to sample from: builtin, a folder, hub:org/name@revision, openai:model@http://host/v1; "
            "left out: builtin for the built-in tasks, else the responses in the file"
        ),
    ] = ()
    strategy: Annotated[
        str,
        Field(
            description="Which responses to draw: paper17, sampling8, greedy, endpoint8; left out: what each LLM can "
            "do, endpoint8 for openai: and vllm:, else paper17"
        ),
    ] = ""
    scorer: Annotated[
        str, Field(description="Scorer to start from: builtin, a folder, hub:org/name@revision, models:/name@alias")
    ] = BUILTIN
    metric: Annotated[
        str,
        Field(description="What makes a response correct: rougeL, ...; `cappy annotation --help` lists all"),
    ] = "rougeL"
    name: Annotated[str, Field(description="Name of the registered model")] = "cappy"
    margin: Annotated[
        float, Field(ge=0, le=1, description="What the gate's lower bound must be above, on the scale of 0 to 1")
    ] = 0.0
    seed: Annotated[int, Field(description="Seed of the split, of sampling and of training, but for those below")] = 0
    split_seed: Annotated[
        int | None, ADVANCED, Field(description="Seed of the split and of the draw of built-in tasks; left out: --seed")
    ] = None
    sampling_seed: Annotated[
        int | None, ADVANCED, Field(description="Seed of the samples; another one keeps the split; left out: --seed")
    ] = None
    training_seed: Annotated[
        int | None,
        ADVANCED,
        Field(
            description="Seed of order, draws and dropout in training; another one keeps the split and the samples; "
            "left out: --seed"
        ),
    ] = None
    folds: Annotated[
        int,
        Field(
            ge=0,
            le=20,
            description="Few instances: train this many times, so that every instance is tested; 0 for a test split",
        ),
    ] = 0
    tracking_uri: Annotated[
        str, Field(description="MLflow's address; left out: MLFLOW_TRACKING_URI, else the database .cappy/mlflow.db")
    ] = ""
    work: Work = DEFAULT_WORK


def adapt_command() -> TyperCommand:
    """The command `cappy adapt`."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    more = [
        inspect.Parameter("setting", keyword, annotation=SettingFlag, default=[]),
        inspect.Parameter("fresh", keyword, annotation=FreshFlag, default=False),
        inspect.Parameter("as_json", keyword, annotation=JsonFlag, default=False),
    ]
    return make_command("adapt", inspect.getdoc(adapt) or "", adapt, [*parameters(AdaptConfig), *more])


def adapt(*, setting: Sequence[str] = (), fresh: bool = False, as_json: bool = False, **values: Any) -> None:
    """Make a scorer for your task: prepare, sample, annotate, finetune, evaluate, register, promote, deploy.

    Runs the Kubeflow pipeline on this machine and ends with the report's table, the gate's decision and the command
    that serves the scorer. Interrupted or run again, it continues where it was.
    """
    from cappy.cli.pipeline import run_and_print, with_fresh

    recipe = _adapt_recipe(build(AdaptConfig, values), setting)
    run_and_print(with_fresh(recipe) if fresh else recipe, "local", as_json)


def _adapt_recipe(config: AdaptConfig, pairs: Sequence[str] = ()) -> "Recipe":
    """The recipe of an adaptation; `pairs` are STEP.SETTING=VALUE words."""
    from cappy.cli.pipeline import load, per_step

    by_step = per_step("adapt", pairs)
    if config.columns:
        by_step["preparation"] = {**by_step.get("preparation", {}), "columns": list(config.columns)}
    if config.folds:
        by_step["evaluation"] = {**by_step.get("evaluation", {}), "folds": config.folds}
    choices = ("strategy", "scorer", "metric", "name", "margin", "seed", "split_seed", "sampling_seed", "training_seed")
    generators = generators_for(config.instances, config.generator, by_step.get("preparation", {}))
    decided = {"source": config.instances, "generator": generators}
    recipe: Recipe = load("pipelines.recipe").check_recipe(
        {
            "pipeline": "adapt",
            "parameters": decided | {name: getattr(config, name) for name in choices},
            "settings": by_step,
            "tracking_uri": config.tracking_uri,
            "work": str(config.work),
        }
    )
    return recipe


def generators_for(instances: str, given: Sequence[str], preparation: Mapping[str, Any]) -> list[str]:
    """What to sample from: the LLMs given, the built-in one for the built-in tasks, none where responses came along.

    `preparation` are further settings of that step, which say how the file is read.
    Looks at the first instance; sampling itself refuses a later one that has no response.
    """
    if given:
        return list(given)
    if instances == BUILTIN:
        return [BUILTIN]
    if not Path(instances).exists():
        raise ConfigError(f"{instances}: no such file or folder; --instances is {FORMS}")
    from cappy.config import build
    from cappy.preparation.sources import open_source
    from cappy.preparation.step import PreparationConfig

    config = build(PreparationConfig, {**preparation, "source": instances, "target": "unused"})
    first = next(open_source(config).rows(), None)
    if first is not None and not first.instance.candidates and not first.instance.choices:
        raise typer.BadParameter(
            f"{first.where} has no responses; name an LLM to sample them from, or give them as responses in the file",
            param_hint="--generator",
        )
    return []
