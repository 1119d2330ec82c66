"""The annotation step: labels for the candidates of a folder of instances."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cappy.annotation.metrics import METRICS, library_versions, load_metric, parse_metric
from cappy.config import ADVANCED, DEFAULT_WORK, Fresh, Location, Renames, Work, Workers, identity, settings
from cappy.errors import ConfigError
from cappy.progress import Progress, silent
from cappy.records import Instance, Manifest, read_manifest
from cappy.records.work import ShardOf, parse_shard, refuse_same
from cappy.steps import step_version


@settings
class AnnotationConfig:
    """Labels for the candidates of a folder of instances."""

    RENAMED: ClassVar[Renames] = {"recipe": "preset", "report": "data_report"}

    source: Annotated[Location, Field(description="Folder of instances with candidates")]
    target: Annotated[Location, Field(description="Folder to write")]
    metric: Annotated[
        str,
        Field(description=f"Metric that labels an LLM's response, 0 to 1: {', '.join(METRICS)}; or 0.5*ONE+0.5*OTHER"),
    ] = "rougeL"
    preset: Annotated[
        Literal["default", "paper"],
        ADVANCED,
        Field(description="paper repeats the published regression set with its quirks; see docs/annotation.md"),
    ] = "default"
    mismatches: Annotated[
        int,
        ADVANCED,
        Field(ge=0, description="Wrong responses per instance: references of others, label 0; paper: 1 per reference"),
    ] = 1
    seed: Annotated[int, ADVANCED, Field(description="Seed of the draw of mismatches")] = 0
    part_rows: Annotated[
        int,
        ADVANCED,
        Field(ge=1, description="Instances per part: a killed run continues at one, mismatches are drawn within one"),
    ] = 512
    shard: ShardOf = ""
    workers: Workers = 1
    work: Work = DEFAULT_WORK
    fresh: Fresh = ""

    def __post_init__(self) -> None:
        parse_metric(self.metric)
        parse_shard(self.shard)
        if self.preset == "paper" and self.mismatches != 1:
            remedy = "leave --mismatches out, or choose --preset default"
            raise ConfigError(f"annotation: --preset paper draws one mismatch for each reference; {remedy}")


def run(config: AnnotationConfig, progress: Progress = silent) -> Manifest:
    """Annotates `source` into `target`; a killed run continues where it was."""
    from cappy.annotation.labels import count_facts
    from cappy.records.parts import process_folder
    from cappy.records.work import claim, finish

    refuse_same(config.source, config.target)
    parent = read_manifest(config.source)
    mismatches = config.mismatches if config.preset == "default" else 0
    with claim(config.work, "annotation", identity(config), [parent.hash], fresh=config.fresh) as folder:
        parts = process_folder(
            config.source,
            folder,
            partial(_annotate_part, config=config),
            rows=parse_shard(config.shard).rows(parent.rows),
            part_rows=config.part_rows,
            progress=progress,
            count=partial(count_facts, name=config.metric, mismatches=mismatches),
            workers=config.workers,
        )
        metrics = {"instances": parts.rows, "candidates": parts.candidates, **parts.counts}
        said = describe_cautions(metrics)
        manifest = Manifest(
            step="annotation",
            files=parts.files,
            config=identity(config),
            step_version=step_version("annotation"),
            seed=config.seed,
            generators=parent.generators,
            parents=(parent.hash,),
            metrics=metrics,
            facts={"metric_versions": library_versions(config.metric), **({"cautions": said} if said else {})},
        )
        return finish(folder, config.target, manifest)


def _annotate_part(part: list[Instance], *, config: AnnotationConfig) -> Iterator[Instance]:
    """One part's work, in whichever process."""
    from cappy.annotation.labels import Labelling, annotate

    labelling = Labelling(
        name=config.metric,
        metric=load_metric(config.metric),
        preset=config.preset,
        mismatches=config.mismatches,
        seed=config.seed,
    )
    return annotate(part, labelling)


def describe_cautions(metrics: Mapping[str, float]) -> list[str]:
    """What a person should know about the labels, by the counts in the manifest: sentences that end with what to do."""
    texts = []
    if reasoning := metrics.get("with_reasoning", 0):
        texts.append(
            f"{_format_share(reasoning, metrics['responses'])} responses hold reasoning such as <think>...</think>, which "
            "the metric compares too; sample with --strip-reasoning"
        )
    instances = metrics.get("instances", 0)
    remedy = "annotate with --metric rougeL_unicode or chrf"
    if unseen := metrics.get("invisible_to_rougeL", 0):
        texts.append(f"{_format_share(unseen, instances)} instances have no reference that Rouge-L can see; {remedy}")
    if partly := metrics.get("partly_invisible_to_rougeL", 0):
        texts.append(
            f"{_format_share(partly, instances)} instances have a reference or response of which Rouge-L sees only a part, "
            f"for it sees [a-z0-9] alone; {remedy}"
        )
    return texts


def _format_share(some: float, of: float) -> str:
    """Such as "3 of 40 (7.5 %)"."""
    return f"{some:,.0f} of {of:,.0f} ({100 * some / max(of, 1):.1f} %)"
