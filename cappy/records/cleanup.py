"""What lies in a work folder: which pieces of work a run can still find by their keys, and which it cannot."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cappy.keys import KEY, Key
from cappy.records.folder import disk_errors
from cappy.records.work import held, read_key
from cappy.steps import STEP_SPECS, step_version


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The folder of one piece of work; `last_used` is in seconds of `time.time`."""

    step: str
    path: Path
    key: Key | None
    size_bytes: int
    last_used: float

    @property
    def unreachable(self) -> str:
        """Why no run of this version finds it again; empty where one can."""
        if self.key is None:
            return "written before work had keys"
        present = step_version(self.step)
        return "" if self.key.version == present else f"of version {self.key.version}, the step has {present}"


def pieces(work: Path, step: str = "") -> Iterator[Piece]:
    """Every piece of work of the steps, or of one step, the newest first within a step."""
    for name in STEP_SPECS:
        if step in ("", name):
            found = [_piece(name, path) for path in (work / name).glob("*") if path.is_dir()]
            yield from sorted(found, key=lambda piece: -piece.last_used)


def remove(piece: Piece) -> None:
    """Deletes a piece of work; FolderError where a process holds it. What was published from it stays.

    The key goes first: what is left by a killed removal is not taken for finished work.
    """
    with held(piece.path, patience=0), disk_errors(piece.path):
        (piece.path / KEY).unlink(missing_ok=True)
        shutil.rmtree(piece.path)


def _piece(step: str, path: Path) -> Piece:
    stats = [file.stat() for file in path.rglob("*") if file.is_file()]
    return Piece(
        step=step,
        path=path,
        key=read_key(path),
        size_bytes=sum(stat.st_size for stat in stats),
        last_used=max((stat.st_mtime for stat in stats), default=path.stat().st_mtime),
    )
