"""Evaluation: does the scorer pick better responses than what needs no scorer, and by how much?

`cappy evaluation --source annotated --scorer folder --target report` writes report.json, report.html, report.md,
table.txt, the plots curve.png, curve.svg, calibration.png and calibration.svg, the map calibration.json that turns
scores into expected labels, picks.json, which `cappy threshold` reads, and probe.json, a few scored pairs that a
deployment checks itself against.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field

from cappy.config import DEFAULT_WORK, Location, Work, settings
from cappy.errors import FolderError
from cappy.evaluation.findings import Difference, Estimate
from cappy.evaluation.report import Report, check_schema
from cappy.progress import Progress, silent
from cappy.records import Instance, Manifest, Split, read_manifest
from cappy.records.folder import verify

if TYPE_CHECKING:
    from cappy.evaluation.pools import Score

__all__ = ["Difference", "Estimate", "EvaluationConfig", "Report", "evaluate", "read_report", "read_values", "run"]


def _enough_folds(folds: int) -> int:
    if folds in (1, 2):
        raise ValueError("takes 3 or more: one to test, one to hold out, the others to train on; 0 for none")
    return folds


@settings
class EvaluationConfig:
    """What a scorer, and the present champion beside it, are worth on held-out instances."""

    source: Annotated[Location, Field(description="Folder of annotated instances")]
    scorer: Annotated[Location, Field(description="Folder of the scorer to evaluate")]
    target: Annotated[Location, Field(description="Folder to write the report to")]
    champion: Annotated[str, Field(description="Spec of the present champion; empty if there is none")] = ""
    metric: Annotated[str, Field(min_length=1, description="Metric whose labels are reported")] = "rougeL"
    split: Annotated[Literal["validation", "test"], Field(description="Split that is reported")] = "test"
    seed: Annotated[int, Field(ge=0, description="Seed of the MBR curve, the examples and the folds")] = 0
    probe: Annotated[bool, Field(description="Probe the scorer for known weaknesses (scores some pairs again)")] = True
    folds: Annotated[
        int,
        Field(ge=0, le=20, description="Train the scorer's recipe this many times and test every instance; 0 for none"),
        AfterValidator(_enough_folds),
    ] = 0
    work: Work = DEFAULT_WORK


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

    The validation split chooses hybrid weights and the best single system. Instances of both splits are held in
    memory, others are passed over. RecordError where there is nothing to report on, or a candidate has no label.
    """
    from cappy.evaluation import protocol

    return protocol.evaluate(
        instances,
        score=score,
        champion=champion,
        metric=metric,
        split=split,
        seed=seed,
        probe=probe,
        progress=progress,
    )


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
        raise FolderError(f"{path}: is missing, so {folder} is no evaluation; give the folder that evaluation wrote")
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    check_schema(values)
    return values


def run(config: EvaluationConfig, progress: Progress = silent) -> Manifest:
    """Evaluates `scorer` (and `champion`) on `source` and writes the report; a killed run keeps the scores it had."""
    from cappy.evaluation.step import evaluate_folder
    from cappy.scoring import Scorer
    from cappy.scoring.training_data import training_data

    return evaluate_folder(config, progress, load=Scorer.load, trained_on=training_data)
