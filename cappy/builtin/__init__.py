"""The embedded default: procedural tasks, a very small LLM and a very small scorer, so that everything runs offline.

Each folder of weights is sealed: its training.json holds the sha256 of every other file in it.
"""

import hashlib
import json
from pathlib import Path

from cappy.errors import FolderError, quote

__all__ = ["LLM_FOLDER", "SCORER_FOLDER", "verify"]

LLM_FOLDER = Path(__file__).parent / "weights" / "llm"
SCORER_FOLDER = Path(__file__).parent / "weights" / "scorer"
SEAL = "training.json"


def verify(folder: Path) -> None:
    """Raises FolderError unless `folder` holds exactly the files that its training.json names, unchanged."""
    try:
        sealed = json.loads((folder / SEAL).read_text())["sha256"]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FolderError(
            f"{folder}: no {SEAL}; restore the folder or make it with `python -m cappy.builtin`"
        ) from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise FolderError(f"{folder / SEAL}: no sha256 in it ({quote(error)}); restore the file") from error
    present = file_hashes(folder)
    for name in sorted(sealed.keys() | present.keys()):
        if sealed.get(name) != present.get(name):
            state = "missing" if name not in present else "not sealed" if name not in sealed else "changed"
            raise FolderError(f"{folder / name}: {state}, against sha256 in {SEAL}; restore the folder")


def file_hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every file in `folder` but the seal, by name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != SEAL
    }
