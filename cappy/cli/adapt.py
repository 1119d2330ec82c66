"""`cappy adapt`: the pipeline that most people want, on this machine."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cappy.cli.flags import FreshFlag, JsonFlag, SettingFlag
from cappy.errors import ConfigError

BUILTIN = "builtin"
FORMS = "builtin, a JSON Lines, CSV or Parquet file, or a folder of records"

WorkFlag = Annotated[Path, typer.Option(help="Folder that keeps unfinished and finished work, to resume from.")]
TrackingFlag = Annotated[
    str,
    typer.Option(help="MLflow's address.", show_default="MLFLOW_TRACKING_URI, else the database .cappy/mlflow.db"),
]


def adapt(
    instances: Annotated[str, typer.Option(help=f"Your task: {FORMS}.")] = BUILTIN,
    columns: Annotated[
        list[str],
        typer.Option(
            metavar="<str>",
            help="Column of your file that holds a field: FIELD=COLUMN, such as instruction=question (repeatable).",
            show_default="none",
        ),
    ] = [],  # noqa: B006 (typer needs the default and copies it)
    generator: Annotated[
        list[str],
        typer.Option(
            metavar="<str>",
            help="LLM to sample from: builtin, a folder, hub:org/name@revision, openai:model@http://host/v1 "
            "(repeatable).",
            show_default="builtin for the built-in tasks, else the responses in the file",
        ),
    ] = [],  # noqa: B006 (typer needs the default and copies it)
    strategy: Annotated[
        str,
        typer.Option(
            help="Which responses to draw: paper17, sampling8, greedy, endpoint8.",
            show_default="what each LLM can do: endpoint8 for openai: and vllm:, else paper17",
        ),
    ] = "",
    scorer: Annotated[
        str, typer.Option(help="Scorer to start from: builtin, a folder, hub:org/name@revision, models:/name@alias.")
    ] = BUILTIN,
    metric: Annotated[
        str,
        typer.Option(
            help="What makes a response correct: rougeL, exact_match, ...; `cappy annotation --help` lists all."
        ),
    ] = "rougeL",
    name: Annotated[str, typer.Option(help="Name of the registered model.")] = "cappy",
    margin: Annotated[
        float, typer.Option(min=0, max=1, help="What the gate's lower bound must be above, on the scale of 0 to 1.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the split, of sampling and of training, but for those below.")] = 0,
    split_seed: Annotated[
        int | None,
        typer.Option(help="Seed of the split and of the draw of built-in tasks.", show_default="--seed"),
    ] = None,
    sampling_seed: Annotated[
        int | None,
        typer.Option(help="Seed of the samples; another one keeps the split.", show_default="--seed"),
    ] = None,
    training_seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of order, draws and dropout in training; another one keeps the split and the samples.",
            show_default="--seed",
        ),
    ] = None,
    folds: Annotated[
        int,
        typer.Option(
            min=0,
            max=20,
            help="Few instances: train this many times, so that every instance is tested; 0 for a test split.",
        ),
    ] = 0,
    tracking_uri: TrackingFlag = "",
    setting: SettingFlag = [],  # noqa: B006 (as above)
    work: WorkFlag = Path(".cappy/work"),
    fresh: FreshFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Make a scorer for your task: prepare, sample, annotate, finetune, evaluate, register, promote, deploy.

    Runs the Kubeflow pipeline on this machine and ends with the report's table, the gate's decision and the command
    that serves the scorer. Interrupted or run again, it continues where it was.
    """
    from cappy.cli.pipeline import load, per_step, run_and_print, with_fresh

    settings = per_step("adapt", setting)
    if columns:
        settings["preparation"] = {**settings.get("preparation", {}), "columns": columns}
    if folds:
        settings["evaluation"] = {**settings.get("evaluation", {}), "folds": folds}
    recipe = load("pipelines.recipe").checked(
        {
            "pipeline": "adapt",
            "parameters": {
                "source": instances,
                "generator": generators_for(instances, generator, settings.get("preparation", {})),
                "strategy": strategy,
                "scorer": scorer,
                "metric": metric,
                "name": name,
                "margin": margin,
                "seed": seed,
                "split_seed": split_seed,
                "sampling_seed": sampling_seed,
                "training_seed": training_seed,
            },
            "settings": settings,
            "tracking_uri": tracking_uri,
            "work": str(work),
        }
    )
    run_and_print(with_fresh(recipe) if fresh else recipe, "local", as_json)


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
