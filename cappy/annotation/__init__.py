"""Annotation: every candidate gets its label, Rouge-L against the references."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated

from pydantic import Field

from cappy.annotation.metrics import METRICS, load, parse, versions
from cappy.config import DEFAULT_WORK, Location, Work, code_version, identity, settings
from cappy.progress import Progress, silent
from cappy.records import Manifest, read, read_batches, read_manifest

__all__ = ["AnnotationConfig", "rouge_l", "run"]


@settings
class AnnotationConfig:
    """Labels for the candidates of a folder of instances."""

    source: Annotated[Location, Field(description="Folder of instances with candidates")]
    target: Annotated[Location, Field(description="Folder to write")]
    metric: Annotated[
        str,
        Field(description=f"Metric that labels an LLM's response, 0 to 1: {', '.join(METRICS)}; or 0.5*ONE+0.5*OTHER"),
    ] = "rougeL"
    mismatches: Annotated[
        int, Field(ge=0, description="Wrong responses added per instance: references of other instances, label 0")
    ] = 1
    seed: Annotated[int, Field(description="Seed of the draw of mismatches")] = 0
    part_rows: Annotated[int, Field(ge=1, description="Instances per part; a killed run continues at a part")] = 512
    work: Work = DEFAULT_WORK

    def __post_init__(self) -> None:
        parse(self.metric)


def rouge_l(references: Sequence[str], response: str, *, use_stemmer: bool = True) -> float:
    """Rouge-L F1 of a response, 0 to 1, the maximum over the references; equal to `rouge_score`'s to the last bit."""
    from cappy.annotation import rouge

    return rouge.rouge_l(references, response, use_stemmer=use_stemmer)


def run(config: AnnotationConfig, progress: Progress = silent) -> Manifest:
    """Annotates `source` into `target`; a killed run continues where it was."""
    from cappy.annotation.labels import annotate
    from cappy.records.work import claim, finish, process

    parent = read_manifest(config.source)
    metric = load(config.metric)
    transform = partial(annotate, name=config.metric, metric=metric, mismatches=config.mismatches, seed=config.seed)
    with claim(config.work, "annotation", identity(config), [parent.hash]) as folder:
        files = process(
            read(config.source), folder, transform, part_rows=config.part_rows, progress=progress, total=parent.rows
        )
        manifest = Manifest(
            step="annotation",
            files=files,
            config=identity(config),
            code=code_version(),
            seed=config.seed,
            generators=parent.generators,
            parents=(parent.hash,),
            metrics={
                "instances": sum(f.rows for f in files),
                "candidates": sum(f.candidates for f in files),
                **_unseen(config),
            },
            facts={"metric_versions": versions(config.metric)},
        )
        return finish(folder, config.target, manifest)


def _unseen(config: AnnotationConfig) -> dict[str, int]:
    """How many instances have references of which Rouge-L sees nothing, if any do: their labels are all 0."""
    from cappy.annotation.rouge import tokenize

    if "rougeL" not in parse(config.metric):
        return {}
    batches = read_batches(config.source, columns=["references"])
    rows = (references for batch in batches for references in batch["references"].to_pylist())
    unseen = sum(not any(tokenize(reference) for reference in references) for references in rows)
    return {"invisible_to_rougeL": unseen} if unseen else {}
