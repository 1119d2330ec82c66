"""The scoring step: scores every candidate of a dataset and stores the scores under the scorer's version."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from cappy.config import ADVANCED, DEFAULT_WORK, RESULT_NEUTRAL, Fresh, Location, Work, result_settings, settings
from cappy.progress import Progress, silent
from cappy.records import Instance, Manifest, read_manifest
from cappy.records.work import ShardSetting, parse_shard, refuse_same_folder
from cappy.scoring.config import Precision
from cappy.steps import step_version

if TYPE_CHECKING:
    from cappy.scoring.scorer import Scorer

__all__ = ["ScoringConfig", "run"]

LOGGER = logging.getLogger(__name__)
UNVERSIONED = "unversioned"
"""The key of scores from a scorer without a version."""


@settings
class ScoringConfig:
    """Score the candidates of a folder."""

    source: Annotated[Location, Field(description="Folder of instances with candidates")]
    target: Annotated[Location, Field(description="Folder to write")]
    scorer: Annotated[
        str,
        RESULT_NEUTRAL,
        Field(
            min_length=1,
            description="Scorer: builtin, a folder, hub:org/name@revision, models:/name@alias or models:/name/version",
        ),
    ] = "builtin"
    precision: Annotated[
        Precision,
        Field(description="Precision of the encoder; auto is bf16 if the device supports it, else fp32"),
    ] = "auto"
    part_rows: Annotated[int, ADVANCED, Field(ge=1, description="Instances per part; runs resume at a part")] = 512
    shard: ShardSetting = ""
    work: Work = DEFAULT_WORK
    fresh: Fresh = ""

    def __post_init__(self) -> None:
        parse_shard(self.shard)


def run(config: ScoringConfig, progress: Progress = silent) -> Manifest:
    """Scores the candidates of `source` into `target`; an interrupted run resumes at the first unfinished part.

    The scores are added to the `scores` of each candidate under the first twelve digits of the scorer's manifest hash.
    Empty responses are not scored.
    """
    from cappy.records.parts import process_folder
    from cappy.records.work import claim, finish
    from cappy.scorers import scorer_folder
    from cappy.scoring.scorer import Scorer

    refuse_same_folder(config.source, config.target)
    parent = read_manifest(config.source)
    scorer = Scorer.load(str(scorer_folder(config.scorer)), precision=config.precision)
    scorer.truncation_counts.log_first = False
    # The chosen precision is recorded instead of `auto`, because scores depend on it.
    work_config = result_settings(config) | {"precision": scorer.precision, "version": scorer.version}

    def transform(part: list[Instance]) -> Iterator[Instance]:
        return _score_part(part, scorer)

    def count(_: Sequence[Instance]) -> Mapping[str, int]:
        # Stored with each part, so that a resumed run knows the counts of earlier parts.
        counts = scorer.truncation_counts
        num_truncated, counts.truncated_pairs = counts.truncated_pairs, 0
        return {"cut_pairs": num_truncated}

    with claim(config.work, "scoring", work_config, [parent.hash, scorer.version], fresh=config.fresh) as folder:
        parts = process_folder(
            config.source,
            folder,
            transform,
            rows=parse_shard(config.shard).rows(parent.rows),
            part_rows=config.part_rows,
            progress=progress,
            count=count,
        )
        num_truncated = parts.counts.get("cut_pairs", 0)
        if num_truncated:
            LOGGER.warning(
                "%d pairs are longer than the scorer's %d tokens and were truncated",
                num_truncated,
                scorer.encoder.max_length,
            )
        manifest = Manifest(
            step="scoring",
            files=parts.files,
            config=work_config,
            step_version=step_version("scoring"),
            generators=parent.generators,
            parents=(parent.hash,),
            metrics={"instances": parts.rows, "candidates": parts.candidates, "cut_pairs": num_truncated},
            facts={"version": scorer.version, "scorer": config.scorer},
        )
        return finish(folder, config.target, manifest)


def _score_part(part: list[Instance], scorer: "Scorer") -> Iterator[Instance]:
    """Adds scores to the instances of a part, and scores all its pairs in one call."""
    pairs = [
        (instance.instruction, candidate.response)
        for instance in part
        for candidate in instance.candidates
        if candidate.response.strip()
    ]
    scores = iter(scorer.score(pairs))
    name = scorer.version or UNVERSIONED
    for instance in part:
        candidates = tuple(
            replace(candidate, scores={**candidate.scores, name: next(scores)})
            if candidate.response.strip()
            else candidate
            for candidate in instance.candidates
        )
        yield replace(instance, candidates=candidates)
