"""Evaluation: compares the responses that a scorer picks with the picks of selectors that need no scorer."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cappy.errors import FolderError
from cappy.evaluation.findings import Difference, Findings, MeanEstimate
from cappy.evaluation.report import Report, check_schema
from cappy.progress import Progress, silent
from cappy.records import Instance, Split, read_manifest
from cappy.records.folder import verify

if TYPE_CHECKING:
    from cappy.selection.pools import ScoreFunction

__all__ = ["Difference", "Findings", "MeanEstimate", "Report", "evaluate", "read_report", "read_values"]


def evaluate(
    instances: Iterable[Instance],
    *,
    score: "ScoreFunction | None",
    champion: "ScoreFunction | None" = None,
    initial: "ScoreFunction | None" = None,
    metric: str = "rougeL",
    split: Split = "test",
    seed: int = 0,
    with_probes: bool = True,
    progress: Progress = silent,
) -> Report:
    """Evaluates every selector on the instances of `split` and returns the report.

    `score` scores (instruction, response) pairs, such as `Scorer.score`; with None, only selectors that need no scorer
    are evaluated. `champion` is the scoring function of the current champion, and `initial` that of the scorer that
    training started from, for comparison. If `with_probes`, the
    report also has measures of known weaknesses of the scorer, for which some pairs are scored again.

    The selector is fitted and the best single system is chosen on the validation split; the champion picks by its
    score alone. Instances of both splits are kept in memory, others are ignored. Raises RecordError if there is
    nothing to report on or a candidate has no label, and ConfigError if a score is missing or not finite, or if all
    scores of the scorer or of the champion are equal.
    """
    from cappy.evaluation.protocol import build_report, score_split, select_split, split_pools

    pools, held_out, skipped = split_pools(instances, metric=metric, split=split)
    others = {name: each for name, each in (("champion", champion), ("initial", initial)) if each is not None}
    scored = score_split(pools, held_out, score, others, seed=seed, with_probes=with_probes, progress=progress)
    evaluated = select_split(scored, metric=metric, seed=seed)
    return build_report([evaluated], metric=metric, split=split, seed=seed, skipped=skipped)


def read_report(folder: str | Path) -> Report:
    """Reads the report of a finished evaluation. Raises FolderError or RecordError if this version cannot read it."""
    return Report.from_dict(read_values(folder))


def read_values(folder: str | Path, *, check_hashes: bool = False) -> dict[str, Any]:
    """Reads report.json as JSON values. Raises RecordError if this version cannot read their schema.

    With `check_hashes`, every file of the folder is first compared with its manifest: an edited report must not pass
    the promotion gate. Raises FolderError if the folder is not an evaluation report, or is damaged.
    """
    path = Path(folder) / "report.json"
    if not path.is_file() and (inner := path.parent / "report" / path.name).is_file():
        raise FolderError(f"{folder}: is not an evaluation report; pass the folder {inner.parent} instead")
    (verify if check_hashes else read_manifest)(folder)
    if not path.is_file():
        raise FolderError(
            f"{folder}: is not an evaluation report, it has no {path.name}; pass the folder that cappy evaluation wrote"
        )
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    check_schema(values)
    return values
