"""Checkpoints of a training run: writes and reads them, decides when one is due, and records SIGTERM.

Tensors are stored as safetensors, the rest as JSON. The two newest checkpoints ("generations") are kept.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType, TracebackType

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cappy.errors import FolderError
from cappy.records.folder import disk_errors, rename_folder, sha256_of

CONTINUE_REMEDY = "run the same command again to continue"
"""The remedy in errors after which the unchanged command continues from the last checkpoint."""
MAX_GENERATIONS = 2
"""Number of generations kept: if the newest is damaged, the one before it is used."""

Tensors = dict[str, Tensor]
_DAMAGE_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, SafetensorError)
_CHECKSUMS = "sums.json"


@dataclass
class TrainingState:
    """The state of the loop; `log` has an entry per check on the validation instances, `curve` has points in between.

    The position in the data and the state of all random draws follow from the seed and `update`. `best_update` and
    `best_pick` belong to the check whose weights are kept: its update, and the mean label, 0 to 1, of the responses
    that the scorer picked on the validation instances (-1.0 before the first). `best_values` belong to the check with
    the highest mean expected label, which may be an earlier one: that label by validation instance. `budget` is the
    current number of padded tokens per pass, smaller than the setting after memory has run out; `events` records that.
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
    """A state and its tensors: current weights, the optimizer's moments (keys "parameter.moment") and best weights."""

    state: TrainingState
    weights: Tensors
    moments: Tensors
    best: Tensors


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes a generation to `folder` atomically and deletes all but the newest `MAX_GENERATIONS`."""
    generation = folder / f"{checkpoint.state.update:09d}"
    temporary = folder / ".tmp"
    with disk_errors(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(checkpoint.weights, temporary / "model.safetensors")
        save_file(checkpoint.best, temporary / "best.safetensors")
        save_file(checkpoint.moments, temporary / "optimizer.safetensors")
        (temporary / "state.json").write_text(json.dumps(asdict(checkpoint.state)))
        checksums = {path.name: sha256_of(path) for path in sorted(temporary.iterdir())}
        (temporary / _CHECKSUMS).write_text(json.dumps(checksums, indent=1))
        for path in (*temporary.iterdir(), temporary):
            _fsync(path)
        rename_folder(temporary, generation, last=_CHECKSUMS)
        _fsync(folder)
        for older in _generations(folder)[:-MAX_GENERATIONS]:
            shutil.rmtree(older, ignore_errors=True)


def load(folder: Path) -> tuple[Checkpoint | None, str]:
    """Returns the newest undamaged checkpoint (None if none was written) and a note about damaged ones (empty if none).

    Damaged generations that are newer are deleted, so that the next one written is the newest. Raises FolderError if
    all are damaged, rather than silently starting over.
    """
    damaged: list[Path] = []
    for generation in reversed(_generations(folder)):
        with contextlib.suppress(*_DAMAGE_ERRORS):
            checkpoint = _read_generation(generation)
            for path in damaged:
                shutil.rmtree(path, ignore_errors=True)
            return checkpoint, _describe_damage(damaged, checkpoint.state.update)
        damaged.append(generation)
    if any((generation / _CHECKSUMS).exists() for generation in damaged):
        raise FolderError(f"{folder}: every checkpoint is damaged; delete this folder to start from update 0")
    return None, ""


def describe_newest(folder: Path) -> str:
    """The path of the newest generation, or "none yet", for an error message."""
    generations = _generations(folder)
    return str(generations[-1]) if generations else "none yet"


def newest_update(folder: Path) -> int:
    """The update of the newest generation, damaged or not; -1 if there is none."""
    generations = _generations(folder)
    return int(generations[-1].name) if generations else -1


def copy_tensors(tensors: Mapping[str, Tensor]) -> Tensors:
    """Copies of the tensors on the CPU, each with its own memory."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


class Shutdown:
    """Records SIGTERM during its `with` block, instead of ending the process at once.

    Only the main thread of a process can handle signals; in other threads `requested` always returns False.
    """

    def __init__(self) -> None:
        self._requested = False
        self._previous_handler: Callable[[int, FrameType | None], object] | int | None = None
        self._in_main_thread = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Shutdown":
        if self._in_main_thread:
            self._previous_handler = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._in_main_thread:
            signal.signal(signal.SIGTERM, self._previous_handler)

    def requested(self) -> bool:
        """Whether SIGTERM was received."""
        return self._requested

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True


class CheckpointClock:
    """Decides when a checkpoint is due: `seconds` after the last one, and every `updates` updates (None: never)."""

    def __init__(self, seconds: float, updates: int | None) -> None:
        self._seconds, self._updates = seconds, updates
        self._last = time.monotonic()

    def due(self, update: int) -> bool:
        """Whether a checkpoint is due after this update (1-based); if so, restarts the clock."""
        by_update = self._updates is not None and update % self._updates == 0
        due = by_update or time.monotonic() - self._last >= self._seconds
        if due:
            self._last = time.monotonic()
        return due


def _describe_damage(damaged: list[Path], update: int) -> str:
    if not damaged:
        return ""
    names = " and ".join(str(int(path.name)) for path in damaged)
    return f"the checkpoint of update {names} is damaged; continued from update {update}"


def _read_generation(generation: Path) -> Checkpoint:
    """Reads and verifies a checkpoint; raises ValueError or OSError if a file is missing or damaged."""
    checksums: Mapping[str, str] = json.loads((generation / _CHECKSUMS).read_text())
    for name, expected in checksums.items():
        if sha256_of(generation / name) != expected:
            raise ValueError(name)
    return Checkpoint(
        state=TrainingState(**json.loads((generation / "state.json").read_text())),
        weights=load_file(generation / "model.safetensors"),
        moments=load_file(generation / "optimizer.safetensors"),
        best=load_file(generation / "best.safetensors"),
    )


def _generations(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"[0-9]+", path.name)) if folder.is_dir() else []


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
