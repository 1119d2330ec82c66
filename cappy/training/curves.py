"""The curves that a run leaves: what was learned in the scorer's folder, what it cost beside it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TRAINING_LOG = "training.json"
LEARNED = ("update", "loss", "rate")
"""What a point tells that a second run would tell again; the rest is speed."""

Point = Mapping[str, float]


def write_log(folder: Path, checks: Sequence[Point], curve: Sequence[Point], events: Sequence[str]) -> None:
    """Writes checks (loss and pick), curve (loss and rate) and events into the scorer's folder.

    Speed stays out of it: the same run twice is the same scorer.
    """
    learned = [{name: point[name] for name in LEARNED} for point in curve]
    log = {"checks": list(checks), "curve": learned, "events": list(events)}
    (folder / TRAINING_LOG).write_text(json.dumps(log, indent=1) + "\n")


def write_speed(work: Path, manifest_hash: str, curve: Sequence[Point]) -> None:
    """Writes what the updates cost under `work`, by the hash of the scorer's manifest."""
    points = [{name: value for name, value in point.items() if name not in LEARNED[1:]} for point in curve]
    path = _speed_path(work, manifest_hash)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(points) + "\n")


def read_curves(folder: Path, work: Path, manifest_hash: str) -> list[dict[str, float]]:
    """Every point of a run's curves, speed among them where `work` still has it; none of a folder without a log."""
    if not (folder / TRAINING_LOG).is_file():
        return []
    log: dict[str, Any] = json.loads((folder / TRAINING_LOG).read_text())
    speed = _speed_path(work, manifest_hash)
    shown = ("update", "pick", "expected")
    picks = [{name: check[name] for name in shown if name in check} for check in log["checks"] if "pick" in check]
    return [*log["curve"], *picks, *(json.loads(speed.read_text()) if speed.is_file() else ())]


def _speed_path(work: Path, manifest_hash: str) -> Path:
    return work / "speed" / f"{manifest_hash}.json"
