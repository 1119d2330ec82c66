"""The annotation step: labels the candidates of a folder of instances."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cappy.annotation.metrics import METRICS, library_versions, load_metric, parse_metric
from cappy.config import ADVANCED, DEFAULT_WORK, Fresh, Location, Renames, Work, Workers, result_settings, settings
from cappy.errors import ConfigError
from cappy.progress import Progress, silent
from cappy.records import Instance, Manifest, read_manifest
from cappy.records.work import ShardSetting, parse_shard, refuse_same_folder
from cappy.steps import step_version


@settings
class AnnotationConfig:
    """Label the candidates of a folder of instances."""

    RENAMED: ClassVar[Renames] = {"recipe": "preset", "report": "data_report"}

    source: Annotated[Location, Field(description="Folder of instances with candidates")]
    target: Annotated[Location, Field(description="Folder to write")]
    metric: Annotated[
        str,
        Field(description=f"Metric that labels LLM responses, 0 to 1: {', '.join(METRICS)}; or a mixture: 0.5*A+0.5*B"),
    ] = "rougeL"
    preset: Annotated[
        Literal["default", "paper"],
        ADVANCED,
        Field(description="paper builds the regression set as the published code does; see docs/annotation.md"),
    ] = "default"
    mismatches: Annotated[
        int,
        ADVANCED,
        Field(ge=0, description="Wrong responses added per instance (references of others); paper: 1 per reference"),
    ] = 1
    seed: Annotated[int, ADVANCED, Field(description="Seed for drawing mismatches")] = 0
    part_rows: Annotated[
        int,
        ADVANCED,
        Field(ge=1, description="Instances per part: runs resume at a part, mismatches are drawn within a part"),
    ] = 512
    shard: ShardSetting = ""
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
    """Annotates `source` into `target`; an interrupted run resumes at the first unfinished part."""
    from cappy.annotation.labels import count_facts
    from cappy.records.parts import process_folder
    from cappy.records.work import claim, finish

    refuse_same_folder(config.source, config.target)
    parent = read_manifest(config.source)
    mismatches = config.mismatches if config.preset == "default" else 0
    with claim(config.work, "annotation", result_settings(config), [parent.hash], fresh=config.fresh) as folder:
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
        cautions = describe_cautions(metrics)
        manifest = Manifest(
            step="annotation",
            files=parts.files,
            config=result_settings(config),
            step_version=step_version("annotation"),
            seed=config.seed,
            generators=parent.generators,
            parents=(parent.hash,),
            metrics=metrics,
            facts={"metric_versions": library_versions(config.metric), **({"cautions": cautions} if cautions else {})},
        )
        return finish(folder, config.target, manifest)


def _annotate_part(part: list[Instance], *, config: AnnotationConfig) -> Iterator[Instance]:
    """Annotates one part; runs in a worker process."""
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
    """Cautions about the labels, from the counts in the manifest: sentences that end with a remedy."""
    cautions = []
    if reasoning := metrics.get("with_reasoning", 0):
        cautions.append(
            f"{_format_share(reasoning, metrics['responses'])} responses hold reasoning such as <think>...</think>, "
            "which the metric compares too; sample with --strip-reasoning"
        )
    instances = metrics.get("instances", 0)
    remedy = "annotate with --metric rougeL_unicode or chrf"
    if invisible := metrics.get("invisible_to_rougeL", 0):
        cautions.append(
            f"{_format_share(invisible, instances)} instances have no reference with an ASCII letter or digit, which "
            f"are all that Rouge-L compares; {remedy}"
        )
    if partly := metrics.get("partly_invisible_to_rougeL", 0):
        cautions.append(
            f"{_format_share(partly, instances)} instances have a reference or response with letters or digits that "
            f"Rouge-L ignores, because it compares only [a-z0-9]; {remedy}"
        )
    return cautions


def _format_share(count: float, total: float) -> str:
    """Such as "3 of 40 (7.5 %)"."""
    return f"{count:,.0f} of {total:,.0f} ({100 * count / max(total, 1):.1f} %)"
