"""The built-in defaults, which run offline: procedural tasks, a very small LLM and a very small scorer.

The training.json of each folder of weights contains the sha256 of every other file.
"""

import hashlib
import json
from pathlib import Path

from cappy.errors import FolderError, quote

__all__ = ["LLM_FOLDER", "TINY_SCORER_FOLDER", "verify"]

LLM_FOLDER = Path(__file__).parent / "weights" / "llm"
TINY_SCORER_FOLDER = Path(__file__).parent / "weights" / "tiny"
TRAINING_RECORD = "training.json"


def verify(folder: Path) -> None:
    """Raises FolderError unless `folder` contains exactly the files listed in its training.json, unchanged."""
    try:
        expected_hashes = json.loads((folder / TRAINING_RECORD).read_text())["sha256"]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FolderError(
            f"{folder}: no {TRAINING_RECORD}; restore the folder, or create it with `python -m cappy.builtin`"
        ) from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise FolderError(f"{folder / TRAINING_RECORD}: has no sha256 ({quote(error)}); restore the file") from error
    current_hashes = file_hashes(folder)
    for name in sorted(expected_hashes.keys() | current_hashes.keys()):
        if expected_hashes.get(name) != current_hashes.get(name):
            state = (
                "missing" if name not in current_hashes else "not listed" if name not in expected_hashes else "changed"
            )
            raise FolderError(f"{folder / name}: {state} (sha256 in {TRAINING_RECORD}); restore the folder")


def file_hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every file in `folder` except training.json, by name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != TRAINING_RECORD
    }
