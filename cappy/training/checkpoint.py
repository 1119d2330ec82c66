"""Where a killed training run continues: tensors as safetensors, the rest as JSON, two generations of each."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cappy.errors import FolderError
from cappy.records.folder import disk_errors, rename_folder, sha256_of

KEPT = 2
"""Generations kept: where the newest is damaged, the one before it stands."""

Tensors = dict[str, Tensor]
_DAMAGE = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, SafetensorError)
_SUMS = "sums.json"


@dataclass
class State:
    """How far the loop is; `log` holds one entry per check of the validation instances, `curve` points between.

    The place in the feed and the state of every random draw follow from the seed and `update`. `best_update` and
    `best_pick` are of the check whose weights are kept, `best_values` the expected labels of the best check, by
    validation instance. `budget` is the token budget in force, smaller than the setting once memory has run out;
    `events` tells of that.
    """

    update: int = 0
    best_pick: float = -1.0
    best_update: int = 0
    best_values: list[float] = field(default_factory=list)
    checks_since_best: int = 0
    stopped: bool = False
    running_loss: float = 0.0
    budget: int = 0
    log: list[dict[str, float]] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A state with its tensors: the model's, the optimizer's (parameter.moment), and the best check's weights."""

    state: State
    weights: Tensors
    moments: Tensors
    best: Tensors


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Adds a generation to `folder`, whole or not at all, and drops all but the last `KEPT`."""
    generation = folder / f"{checkpoint.state.update:09d}"
    temporary = folder / ".tmp"
    with disk_errors(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(checkpoint.weights, temporary / "model.safetensors")
        save_file(checkpoint.best, temporary / "best.safetensors")
        save_file(checkpoint.moments, temporary / "optimizer.safetensors")
        (temporary / "state.json").write_text(json.dumps(asdict(checkpoint.state)))
        sums = {path.name: sha256_of(path) for path in sorted(temporary.iterdir())}
        (temporary / _SUMS).write_text(json.dumps(sums, indent=1))
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
        rename_folder(temporary, generation, last=_SUMS)
        _flush(folder)
        for older in _generations(folder)[:-KEPT]:
            shutil.rmtree(older, ignore_errors=True)


def load(folder: Path) -> tuple[Checkpoint | None, str]:
    """The newest undamaged checkpoint, and what is to be said of those passed over; None where there never was one.

    Damaged generations are deleted, so that the next one written is not older than they are. FolderError where all
    are damaged: starting over would be a surprise.
    """
    passed: list[Path] = []
    for generation in reversed(_generations(folder)):
        with contextlib.suppress(*_DAMAGE):
            checkpoint = _read(generation)
            for damaged in passed:
                shutil.rmtree(damaged, ignore_errors=True)
            return checkpoint, _said(passed, checkpoint.state.update)
        passed.append(generation)
    if any((generation / _SUMS).exists() for generation in passed):
        raise FolderError(f"{folder}: every checkpoint is damaged; delete this folder to start from update 0")
    return None, ""


def newest(folder: Path) -> str:
    """The newest generation's path as an error names it."""
    found = _generations(folder)
    return str(found[-1]) if found else "none yet"


def newest_update(folder: Path) -> int:
    """The update of the newest generation, damaged or not; -1 where there is none."""
    found = _generations(folder)
    return int(found[-1].name) if found else -1


def _said(passed: list[Path], update: int) -> str:
    if not passed:
        return ""
    names = " and ".join(str(int(path.name)) for path in passed)
    return f"the checkpoint of update {names} is damaged, continued from update {update}"


def _read(generation: Path) -> Checkpoint:
    """ValueError or OSError where a file is missing or is not what was written."""
    sums: Mapping[str, str] = json.loads((generation / _SUMS).read_text())
    for name, expected in sums.items():
        if sha256_of(generation / name) != expected:
            raise ValueError(name)
    return Checkpoint(
        state=State(**json.loads((generation / "state.json").read_text())),
        weights=load_file(generation / "model.safetensors"),
        moments=load_file(generation / "optimizer.safetensors"),
        best=load_file(generation / "best.safetensors"),
    )


def _generations(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"[0-9]+", path.name)) if folder.is_dir() else []


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copied(tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors as they are now, on the CPU, each in memory of its own."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
