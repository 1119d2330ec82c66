"""Files of a user's own, and the step run on them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cappy.preparation.step import PreparationConfig, run
from cappy.records import Instance, Manifest, read

Prepare = Callable[..., tuple[Manifest, list[Instance]]]


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    """prepare(source, **settings): the manifest and the instances of the step, in a fresh target each time."""

    def prepared(source: str | Path, **settings: Any) -> tuple[Manifest, list[Instance]]:
        target = settings.pop("target", None) or tmp_path / f"target{len(list(tmp_path.glob('target*')))}"
        manifest = run(PreparationConfig(source=str(source), target=target, work=tmp_path / "work", **settings))
        return manifest, list(read(target))

    return prepared


@pytest.fixture
def json_lines(tmp_path: Path) -> Callable[..., Path]:
    """json_lines(*rows, name="data.jsonl"): the rows as a file."""

    def written(*rows: Any, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return written


@pytest.fixture
def ten_rows() -> list[dict[str, Any]]:
    """Ten rows with the least that a row may have."""
    return [{"instruction": f"Add one to {number}.", "reference": str(number + 1)} for number in range(10)]
