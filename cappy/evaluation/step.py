"""The evaluation step: what a scorer, and the champion beside it, are worth on held-out instances.

`cappy evaluation --source annotated --scorer folder --target report` writes report.json, report.html, report.md,
table.txt, the plots curve.png, curve.svg, calibration.png and calibration.svg, the map calibration.json that turns
scores into expected labels, picks.json, which `cappy threshold` reads, and probe.json, a few scored pairs that a
deployment checks itself against.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from cappy.config import DEFAULT_WORK, Fresh, Location, Work, settings
from cappy.progress import Progress, silent
from cappy.records import Manifest


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
    fresh: Fresh = ""


def run(config: EvaluationConfig, progress: Progress = silent) -> Manifest:
    """Evaluates `scorer` (and `champion`) on `source` and writes the report; a killed run keeps the scores it had."""
    from cappy.evaluation.folder import evaluate_folder
    from cappy.scoring import Scorer
    from cappy.scoring.training_data import training_data

    return evaluate_folder(config, progress, load=Scorer.load, trained_on=training_data)
