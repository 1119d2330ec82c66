"""`cappy adapt`: runs the complete pipeline on this machine."""

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
INSTANCE_FORMS = "builtin, a JSON Lines, CSV or Parquet file, or a folder of records"


@settings
class AdaptConfig:
    """The main settings of an adaptation; every other setting of a step is given with `--set`."""

    instances: Annotated[str, Field(description=f"Your task: {INSTANCE_FORMS}")] = BUILTIN
    columns: Annotated[
        tuple[str, ...],
        Field(description="Column of your file for a field: FIELD=COLUMN, such as instruction=question"),
    ] = ()
    generator: Annotated[
        tuple[str, ...],
        Field(
            description="LLM to sample from: builtin, a folder, hub:org/name@revision, openai:model@http://host/v1; "
            "default: builtin for the built-in tasks, else the responses in the file"
        ),
    ] = ()
    strategy: Annotated[
        str,
        Field(
            description="Responses to sample: paper17 (17, as in the paper), sampling8 (8 samples), greedy (1), "
            "endpoint8 (8 from an API); default: endpoint8 for openai: and vllm:, else paper17"
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
        float,
        Field(
            ge=0,
            le=1,
            description="Minimum gain for a promotion, 0 to 1: the lower bound of the gain must be above it",
        ),
    ] = 0.0
    seed: Annotated[int, Field(description="Seed of the split, of sampling and of training")] = 0
    split_seed: Annotated[
        int | None, ADVANCED, Field(description="Seed of the split and of the built-in tasks; default: --seed")
    ] = None
    sampling_seed: Annotated[
        int | None, ADVANCED, Field(description="Seed of sampling; does not change the split; default: --seed")
    ] = None
    training_seed: Annotated[
        int | None,
        ADVANCED,
        Field(
            description="Seed of instance order, drawn responses and dropout in training; does not change the split "
            "and the samples; default: --seed"
        ),
    ] = None
    folds: Annotated[
        int,
        Field(
            ge=0,
            le=20,
            description="Number of folds of cross-fitting, which suits few instances; 0: use a test split",
        ),
    ] = 0
    tracking_uri: Annotated[
        str, Field(description="MLflow's address; default: MLFLOW_TRACKING_URI, else the database .cappy/mlflow.db")
    ] = ""
    work: Work = DEFAULT_WORK


def adapt_command() -> TyperCommand:
    """The command `cappy adapt`."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    other_parameters = [
        inspect.Parameter("setting", keyword, annotation=SettingFlag, default=[]),
        inspect.Parameter("fresh", keyword, annotation=FreshFlag, default=False),
        inspect.Parameter("as_json", keyword, annotation=JsonFlag, default=False),
    ]
    return make_command("adapt", inspect.getdoc(adapt) or "", adapt, [*parameters(AdaptConfig), *other_parameters])


def adapt(*, setting: Sequence[str] = (), fresh: bool = False, as_json: bool = False, **values: Any) -> None:
    """Make a scorer for your task: prepare, sample, annotate, finetune, evaluate, register, promote, deploy.

    Runs the Kubeflow pipeline on this machine and prints the table of the report, the gate's decision and the command
    that serves the scorer. After an interruption, run it again to continue.
    """
    from cappy.cli.pipeline import run_and_print, with_fresh

    recipe = _adapt_recipe(build(AdaptConfig, values), setting)
    run_and_print(with_fresh(recipe) if fresh else recipe, "local", as_json)


def _adapt_recipe(config: AdaptConfig, assignments: Sequence[str] = ()) -> "Recipe":
    """The recipe of an adaptation; `assignments` are STEP.SETTING=VALUE texts."""
    from cappy.cli.pipeline import load, settings_by_step

    by_step = settings_by_step("adapt", assignments)
    if config.columns:
        by_step["preparation"] = {**by_step.get("preparation", {}), "columns": list(config.columns)}
    if config.folds:
        by_step["evaluation"] = {**by_step.get("evaluation", {}), "folds": config.folds}
    parameter_names = (
        "strategy",
        "scorer",
        "metric",
        "name",
        "margin",
        "seed",
        "split_seed",
        "sampling_seed",
        "training_seed",
    )
    generators = generators_for(config.instances, config.generator, by_step.get("preparation", {}))
    main_parameters = {"source": config.instances, "generator": generators}
    recipe: Recipe = load("pipelines.recipe").check_recipe(
        {
            "pipeline": "adapt",
            "parameters": main_parameters | {name: getattr(config, name) for name in parameter_names},
            "settings": by_step,
            "tracking_uri": config.tracking_uri,
            "work": str(config.work),
        }
    )
    return recipe


def generators_for(instances: str, requested: Sequence[str], preparation: Mapping[str, Any]) -> list[str]:
    """The LLMs to sample from: the requested ones, builtin for the built-in tasks, none if the file has responses.

    `preparation` are settings of that step, which say how to read the file. Only the first instance is checked here;
    sampling rejects later ones without responses.
    """
    if requested:
        return list(requested)
    if instances == BUILTIN:
        return [BUILTIN]
    if not Path(instances).exists():
        raise ConfigError(f"{instances}: no such file or folder; --instances must be {INSTANCE_FORMS}")
    from cappy.config import build
    from cappy.preparation.sources import open_source
    from cappy.preparation.step import PreparationConfig

    config = build(PreparationConfig, {**preparation, "source": instances, "target": "unused"})
    first = next(open_source(config).rows(), None)
    if first is not None and not first.instance.candidates and not first.instance.choices:
        raise typer.BadParameter(
            f"{first.where} has no responses; give an LLM to sample from, or put responses into the file",
            param_hint="--generator",
        )
    return []
