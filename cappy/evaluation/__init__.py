"""Evaluation: does the scorer pick better responses than what needs no scorer, and by how much?"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cappy.errors import FolderError
from cappy.evaluation.findings import Difference, Estimate, Findings
from cappy.evaluation.report import Report, check_schema
from cappy.progress import Progress, silent
from cappy.records import Instance, Split, read_manifest
from cappy.records.folder import verify

if TYPE_CHECKING:
    from cappy.selection.pools import Score

__all__ = ["Difference", "Estimate", "Findings", "Report", "evaluate", "read_report", "read_values"]


def evaluate(
    instances: Iterable[Instance],
    *,
    score: "Score | None",
    champion: "Score | None" = None,
    metric: str = "rougeL",
    split: Split = "test",
    seed: int = 0,
    probe: bool = True,
    progress: Progress = silent,
) -> Report:
    """Every selector on the instances of `split`, with intervals; `score` is `Scorer.score` or alike, None for none.

    The validation split chooses weights and the best single system. Instances of both splits are held in memory,
    others are passed over. RecordError where there is nothing to report on, or a candidate has no label.
    """
    from cappy.evaluation.protocol import build_report, evaluate_split, split_pools

    pools, held_out, skipped = split_pools(instances, metric=metric, split=split)
    evaluated = evaluate_split(
        pools, held_out, score, champion, metric=metric, seed=seed, probe=probe, progress=progress
    )
    return build_report([evaluated], metric=metric, split=split, seed=seed, skipped=skipped)


def read_report(folder: str | Path) -> Report:
    """The report of a finished evaluation; FolderError or RecordError if there is none that this version reads."""
    return Report.from_dict(read_values(folder))


def read_values(folder: str | Path, *, checked: bool = False) -> dict[str, Any]:
    """The values of report.json, as they stand there, of a schema that this version reads.

    `checked` compares every file of the folder with its manifest first: a gate must not open for an edited report.
    """
    path = Path(folder) / "report.json"
    if not path.is_file() and (inner := path.parent / "report" / path.name).is_file():
        raise FolderError(f"{folder}: is not an evaluation; give the folder {inner.parent} in it")
    (verify if checked else read_manifest)(folder)
    if not path.is_file():
        raise FolderError(
            f"{folder}: is not an evaluation, it has no {path.name}; give the folder that evaluation wrote"
        )
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    check_schema(values)
    return values
