"""Where a stopped training run continues: its checkpoints, when one is due, and the wish to end that makes one due.

Tensors are kept as safetensors, the rest as JSON, two generations of each.
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
"""What the error of a run says that lost nothing and has nothing to mend."""
MAX_GENERATIONS = 2
"""Generations kept: where the newest is damaged, the one before it stands."""

Tensors = dict[str, Tensor]
_DAMAGE_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, SafetensorError)
_CHECKSUMS = "sums.json"


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
    """Adds a generation to `folder`, whole or not at all, and drops all but the last `MAX_GENERATIONS`."""
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
        (temporary / _CHECKSUMS).write_text(json.dumps(sums, indent=1))
        for path in (*temporary.iterdir(), temporary):
            _fsync(path)
        rename_folder(temporary, generation, last=_CHECKSUMS)
        _fsync(folder)
        for older in _generations(folder)[:-MAX_GENERATIONS]:
            shutil.rmtree(older, ignore_errors=True)


def load(folder: Path) -> tuple[Checkpoint | None, str]:
    """The newest undamaged checkpoint, and what is to be said of those passed over; None where there never was one.

    Damaged generations are deleted, so that the next one written is not older than they are. FolderError where all
    are damaged: starting over would be a surprise.
    """
    passed: list[Path] = []
    for generation in reversed(_generations(folder)):
        with contextlib.suppress(*_DAMAGE_ERRORS):
            checkpoint = _read_generation(generation)
            for damaged in passed:
                shutil.rmtree(damaged, ignore_errors=True)
            return checkpoint, _describe_damage(passed, checkpoint.state.update)
        passed.append(generation)
    if any((generation / _CHECKSUMS).exists() for generation in passed):
        raise FolderError(f"{folder}: every checkpoint is damaged; delete this folder to start from update 0")
    return None, ""


def describe_newest(folder: Path) -> str:
    """The newest generation's path as an error names it."""
    generations = _generations(folder)
    return str(generations[-1]) if generations else "none yet"


def newest_update(folder: Path) -> int:
    """The update of the newest generation, damaged or not; -1 where there is none."""
    generations = _generations(folder)
    return int(generations[-1].name) if generations else -1


def copy_tensors(tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors as they are now, on the CPU, each in memory of its own."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


class Shutdown:
    """Knows, while its block runs, whether SIGTERM asked this process to end; outside, SIGTERM ends it at once.

    Only a process's main thread can listen; elsewhere nothing is ever requested.
    """

    def __init__(self) -> None:
        self._requested = False
        self._before: Callable[[int, FrameType | None], object] | int | None = None
        self._listens = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Shutdown":
        if self._listens:
            self._before = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._before)

    def requested(self) -> bool:
        """Whether SIGTERM came."""
        return self._requested

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True


class CheckpointClock:
    """Says when a checkpoint is due: so many seconds, or so many updates, after the last one."""

    def __init__(self, seconds: float, updates: int | None) -> None:
        self._seconds, self._updates = seconds, updates
        self._last = time.monotonic()

    def due(self, update: int) -> bool:
        """Whether one is due after this update (1-based); asking for one begins the seconds anew."""
        by_update = self._updates is not None and update % self._updates == 0
        due = by_update or time.monotonic() - self._last >= self._seconds
        if due:
            self._last = time.monotonic()
        return due


def _describe_damage(passed: list[Path], update: int) -> str:
    if not passed:
        return ""
    names = " and ".join(str(int(path.name)) for path in passed)
    return f"the checkpoint of update {names} is damaged, continued from update {update}"


def _read_generation(generation: Path) -> Checkpoint:
    """ValueError or OSError where a file is missing or is not what was written."""
    sums: Mapping[str, str] = json.loads((generation / _CHECKSUMS).read_text())
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


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
