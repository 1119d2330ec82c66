"""Preparation: where instances come from, and which split each belongs to for life."""

from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from cappy.config import DEFAULT_WORK, LOCATION, Location, Work, code_version, identity, settings
from cappy.errors import ConfigError
from cappy.preparation.columns import parse
from cappy.progress import Progress, silent
from cappy.records import Manifest

__all__ = ["PreparationConfig", "run"]

BUILTIN = "builtin"


@settings
class PreparationConfig:
    """Instances from the built-in tasks, a file of one's own, or a folder of records."""

    source: Annotated[
        str,
        LOCATION,
        Field(
            min_length=1,
            description="builtin, a JSON Lines (.gz and .xz too), CSV or Parquet file, or a folder of records",
        ),
    ] = BUILTIN
    target: Annotated[Location, Field(description="Folder to write")]
    seed: Annotated[int, Field(description="Seed of the split, and of the draw of built-in tasks")] = 0
    test: Annotated[
        float, Field(ge=0, lt=1, description="Fraction of a file's groups for the report; kept from all training")
    ] = 0.2
    validation: Annotated[
        float, Field(ge=0, lt=1, description="Fraction of a file's groups that stops training early and calibrates")
    ] = 0.1
    task: Annotated[
        str | None, Field(min_length=1, description="Task of instances that name none; a file's own name if left out")
    ] = None
    num_per_family: Annotated[int, Field(ge=1, description="Instances of each built-in family")] = 80
    families: Annotated[tuple[str, ...], Field(description="Built-in families to draw from; all if left out")] = ()
    pool: Annotated[
        Literal["adaptation", "pretraining"],
        Field(description="Built-in pool: adaptation has a test split, pretraining leaves the held-out families out"),
    ] = "adaptation"
    columns: Annotated[
        tuple[str, ...],
        Field(description="Column of a file that a field is read from: FIELD=COLUMN, such as instruction=question"),
    ] = ()
    exclude: Annotated[
        tuple[str, ...],
        Field(description="Pattern of systems whose candidates are left out of a file, such as 'primary/*'"),
    ] = ()
    max_characters: Annotated[int, Field(ge=1, description="Longest text accepted from a file, in characters")] = 20_000
    part_rows: Annotated[int, Field(ge=1, description="Instances per part; a killed run continues at a part")] = 512
    work: Work = DEFAULT_WORK

    def __post_init__(self) -> None:
        if self.test + self.validation >= 1:
            share = f"--test {self.test} and --validation {self.validation}"
            raise ConfigError(f"preparation: {share} leave nothing to train on; their sum must be below 1")
        if parse(self.columns) and self.source == BUILTIN:
            raise ConfigError("preparation: --columns names columns of a file; leave it out without a --source")
        if self.families and self.source != BUILTIN:
            raise ConfigError("preparation: --families chooses among the built-in tasks; leave it out with a --source")


def run(config: PreparationConfig, progress: Progress = silent) -> Manifest:
    """Prepares `source` into `target`.

    Every row is checked before anything is written, so a bad one costs no half-written folder. The source is read
    twice and never held in memory: for each row only the hashes of its id, group and prompt are.
    """
    from cappy.preparation.sources import open_source
    from cappy.preparation.splits import place, survey
    from cappy.records.parts import process
    from cappy.records.work import claim, finish

    source = open_source(config)
    plan = survey(source, config, progress)
    values = {**identity(config), "task": source.task}
    with claim(config.work, "preparation", {**values, "format": source.format}, source.parents) as folder:
        parts = process(
            place(source.rows(), plan),
            folder,
            lambda part: part,
            part_rows=config.part_rows,
            progress=partial(progress, unit="instances"),
            total=plan.num_rows,
        )
        source.check_unchanged()
        manifest = Manifest(
            step="preparation",
            files=parts.files,
            config=values,
            code=code_version(),
            seed=config.seed,
            generators=source.generators,
            parents=source.parents,
            metrics={**plan.metrics, "candidates": float(parts.candidates)},
            facts={"format": source.format},
        )
        return finish(folder, config.target, manifest)
