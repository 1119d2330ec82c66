"""`cappy adapt`: runs the complete pipeline on this machine."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import Field
from typer.core import TyperCommand

from cappy.cli.flags import (
    EstimateFlag,
    FreshFlag,
    JsonFlag,
    NoChecksFlag,
    SettingFlag,
    explicit_values,
    make_command,
    parameters,
)
from cappy.config import ADVANCED, DEFAULT_WORK, Work, build, flag, settings
from cappy.errors import CappyError, ConfigError
from cappy.sampling import Concurrency, MaxTotalCost, MaxTotalRequests, MaxTotalTokens, PriceInput, PriceOutput

if TYPE_CHECKING:
    from pipelines.recipe import Recipe

BUILTIN = "builtin"
SAMPLING_FLAGS = (
    *("concurrency", "max_total_cost", "price_input", "price_output", "max_total_requests", "max_total_tokens"),
)
"""Settings of sampling that are flags here too: what its requests may cost."""
FOLDS = 5
"""Folds of cross-fitting that is chosen by itself."""
MIN_TEST_GROUPS = 100
"""With fewer groups in the test split, cross-fitting is chosen by itself: the interval of a mean is wide."""
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
            "or recorded:FILE, samples that an LLM gave earlier; default: builtin for the built-in tasks, else the "
            "responses in the file"
        ),
    ] = ()
    strategy: Annotated[
        str,
        Field(
            description="Responses to sample: paper17 (17, as in the paper), sampling8 (8 samples), greedy (1), "
            "endpoint8 (8 from an API); default: endpoint8 for openai: and vllm:, all samples of recorded:, else "
            "greedy+paper17"
        ),
    ] = ""
    scorer: Annotated[
        str,
        Field(
            description="Scorer to start from: builtin, a folder, hub:org/name@revision, models:/name@alias; or an "
            "encoder, which gets a new head"
        ),
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
        int | None,
        Field(
            ge=0,
            le=20,
            description="Folds of cross-fitting, which tests on all instances; 0: use a test split; default: 5 if the "
            f"test split would have fewer than {MIN_TEST_GROUPS} groups and it ends within --cross-fitting-minutes",
        ),
    ] = None
    cross_fitting_minutes: Annotated[
        float, Field(ge=0, description="Longest estimated time of cross-fitting that is chosen by itself")
    ] = 30.0
    concurrency: Concurrency = 8
    max_total_cost: MaxTotalCost = 0.0
    price_input: PriceInput = 0.0
    price_output: PriceOutput = 0.0
    max_total_requests: MaxTotalRequests = 0
    max_total_tokens: MaxTotalTokens = 0
    tracking_uri: Annotated[
        str, Field(description="MLflow's address; default: MLFLOW_TRACKING_URI, else the database .cappy/mlflow.db")
    ] = ""
    work: Work = DEFAULT_WORK


def adapt_command() -> TyperCommand:
    """The command `cappy adapt`."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    other_parameters = [
        inspect.Parameter("context", keyword, annotation=typer.Context),
        inspect.Parameter("setting", keyword, annotation=SettingFlag, default=[]),
        inspect.Parameter("estimate", keyword, annotation=EstimateFlag, default=False),
        inspect.Parameter("no_checks", keyword, annotation=NoChecksFlag, default=False),
        inspect.Parameter("fresh", keyword, annotation=FreshFlag, default=False),
        inspect.Parameter("as_json", keyword, annotation=JsonFlag, default=False),
    ]

    def verb(*, context: typer.Context, **values: Any) -> None:
        explicit = explicit_values(context, values)
        adapt(**{name: value for name, value in values.items() if name not in SAMPLING_FLAGS or name in explicit})

    return make_command("adapt", inspect.getdoc(adapt) or "", verb, [*parameters(AdaptConfig), *other_parameters])


def adapt(
    *,
    setting: Sequence[str] = (),
    estimate: bool = False,
    no_checks: bool = False,
    fresh: bool = False,
    as_json: bool = False,
    **values: Any,
) -> None:
    """Make a scorer for your task: prepare, sample, annotate, finetune, evaluate, register, promote, deploy.

    Runs the Kubeflow pipeline on this machine and prints the table of the report, the gate's decision and the command
    that serves the scorer. After an interruption, run it again to continue.
    """
    from cappy.cli.pipeline import print_estimate, run_and_print, with_fresh

    if estimate and no_checks:
        raise typer.BadParameter("an estimate makes no such checks; leave it out", param_hint="--no-checks")
    sampling_values = {name: values.pop(name) for name in SAMPLING_FLAGS if name in values}
    config = build(AdaptConfig, values)
    recipe = _adapt_recipe(config, setting, sampling_values)
    if config.folds is None:
        recipe = _choose_folds(config, recipe, keep=not estimate)
    recipe = with_fresh(recipe) if fresh else recipe
    if estimate:
        print_estimate(recipe, as_json)
    else:
        run_and_print(recipe, "local", as_json, checks=not no_checks)


def _adapt_recipe(
    config: AdaptConfig, assignments: Sequence[str] = (), sampling_values: Mapping[str, Any] | None = None
) -> "Recipe":
    """The recipe of an adaptation; `assignments` are STEP.SETTING=VALUE texts, `sampling_values` flags of that step."""
    from cappy.cli.pipeline import load, settings_by_step

    by_step = settings_by_step("adapt", assignments)
    flags: dict[str, dict[str, Any]] = {"sampling": dict(sampling_values or {}), "preparation": {}}
    if config.columns:
        flags["preparation"]["columns"] = list(config.columns)
    for step, values in flags.items():
        for name, value in values.items():
            if name in by_step.get(step, {}):
                raise ConfigError(f"{flag(name)} and --set {step}.{name} set the same; leave one of them out")
            by_step.setdefault(step, {})[name] = value
    if config.folds:
        by_step = _cross_fit(by_step, config.folds)
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


def _cross_fit(by_step: Mapping[str, Mapping[str, Any]], folds: int) -> dict[str, dict[str, Any]]:
    """The settings of the steps with cross-fitting, which needs no test split: the scorer is trained on it too."""
    return {
        **{step: dict(values) for step, values in by_step.items()},
        "evaluation": {**by_step.get("evaluation", {}), "folds": folds},
        "preparation": {"test": 0.0, **by_step.get("preparation", {})},
    }


def _choose_folds(config: AdaptConfig, recipe: "Recipe", *, keep: bool) -> "Recipe":
    """The recipe with cross-fitting if its test split would be small and there is time for it; says so on stderr.

    With `keep` the estimate is kept in the work folder for a rerun.
    """
    from cappy.cli.pipeline import load
    from cappy.progress import duration

    given = {*recipe.settings.get("evaluation", {})} & {"folds", "split"} | {
        *recipe.settings.get("preparation", {})
    } & {"test"}
    if given or _champion_has_no_folds(config):
        return recipe
    planning = load("pipelines.planning")
    try:
        planning.check(recipe, "local")
        estimate = load("pipelines.preview").estimate_cross_fitting(
            planning.configs_of(recipe), config.work, folds=FOLDS, enough_groups=MIN_TEST_GROUPS, keep=keep
        )
    except (CappyError, AttributeError):
        # A configuration without the usual names of sizes has no estimate. The checks before the run report the errors,
        # together with the other problems.
        return recipe
    if estimate is None:
        return recipe
    groups = f"{estimate.groups:,} groups, of which a test split would have {estimate.test_groups:,}"
    if estimate.seconds is None:
        text = f"how long cross-fitting takes is not known before {config.scorer} is downloaded; --folds 5 does it"
        typer.echo(f"cappy adapt: {groups}; {text}", err=True)
        return recipe
    time = f"about {duration(estimate.seconds)}"
    if estimate.seconds > 60 * config.cross_fitting_minutes:
        limit = f"over the limit of {config.cross_fitting_minutes:g} min"
        remedy = "--cross-fitting-minutes or --folds 5 does it anyway"
        typer.echo(f"cappy adapt: {groups}; cross-fitting would take {time}, {limit}: {remedy}", err=True)
        return recipe
    text = f"{FOLDS} folds test on all of them, which takes {time} of training; --folds 0 uses a test split"
    typer.echo(f"cappy adapt: {groups}; {text}", err=True)
    return replace(recipe, settings=_cross_fit(recipe.settings, FOLDS))


def _champion_has_no_folds(config: AdaptConfig) -> bool:
    """Whether there is a champion that a cross-fitted report could not be compared with."""
    from cappy.evaluation.findings import OUT_OF_FOLD
    from cappy.registry.models import EVALUATION_TAGS, no_database_yet

    if no_database_yet(config.tracking_uri):
        return False
    from cappy.registry import champion

    try:
        version = champion(config.name, tracking_uri=config.tracking_uri)
    except CappyError:
        return False
    return version is not None and EVALUATION_TAGS[OUT_OF_FOLD] not in version.tags


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
