"""Stored pairs: what a scorer answered when it was evaluated, kept beside it as probe.json."""

import json
from pathlib import Path

from cappy.errors import FolderError

PROBE = "probe.json"
Triple = tuple[str, str, float]
"""(instruction, response, score)."""


def read_probe(folder: str | Path) -> list[Triple]:
    """The triples in a scorer's or a report's folder, none if there is no file; FolderError if it is damaged."""
    path = Path(folder) / PROBE
    if not path.is_file():
        return []
    try:
        triples = json.loads(path.read_text(encoding="utf-8"))
        found = [(instruction, response, float(score)) for instruction, response, score in triples]
        if not all(isinstance(text, str) for triple in found for text in triple[:2]):
            raise ValueError("a text is none")
    except (ValueError, TypeError) as error:
        raise FolderError(f"{path}: holds no stored pairs ({error}); evaluate again, or delete it") from error
    return found
