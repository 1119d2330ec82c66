"""Scores that are kept in the work folder, so that a run that was killed does not ask for them again."""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

from cappy.evaluation.pools import Score
from cappy.records.folder import write_bytes


def remembered(score: Score, folder: Path, name: str) -> Score:
    """`score`, each call's answer kept in a hidden file of the work folder: a restart does not score it again.

    The file has the seconds that it took too.
    """

    def scores(pairs: Sequence[tuple[str, str]]) -> list[float]:
        key = hashlib.sha256(json.dumps(list(pairs)).encode()).hexdigest()[:16]
        path = folder / f".{name}-{key}.json"
        if not path.is_file():
            started = time.monotonic()
            values = [float(value) for value in score(pairs)]
            told = {"scores": values, "seconds": time.monotonic() - started}
            write_bytes(path, json.dumps(told).encode())
        kept: list[float] = json.loads(path.read_text())["scores"]
        return kept

    return scores


def seconds_per_pair(folder: Path) -> float | None:
    """The scorer's time for a pair, over the calls with 100 pairs or more that `remembered` kept, else all."""
    paths = [path for pattern in (".challenger-*.json", ".fold-*.json") for path in sorted(folder.glob(pattern))]
    calls = [json.loads(path.read_text()) for path in paths]
    large = [call for call in calls if len(call["scores"]) >= 100] or calls
    pairs = sum(len(call["scores"]) for call in large)
    return sum(call["seconds"] for call in large) / pairs if pairs else None
