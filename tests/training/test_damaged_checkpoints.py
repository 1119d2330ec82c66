"""Checkpoints that somebody else wrote, or that a disk damaged: passed over, never a traceback."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from wording import assert_names, raises_naming

from cappy.errors import FolderError
from cappy.training.checkpoint import Checkpoint, State, load, newest_update, save

DAMAGE = {"sums.json": ["[]", "[" * 100_000, "5", '{"a": 1}'], "state.json": ["[" * 100_000, "[]", '{"no": 1}']}


def saved(folder: Path, update: int) -> Path:
    tensors = {"weight": torch.ones(2)}
    save(folder, Checkpoint(state=State(update=update), weights=tensors, moments=tensors, best=tensors))
    return folder / f"{update:09d}"


def replace(generation: Path, name: str, data: bytes) -> None:
    """Another file, with its sum where it has one."""
    (generation / name).write_bytes(data)
    if name != "sums.json":
        sums = json.loads((generation / "sums.json").read_text())
        sums[name] = hashlib.sha256(data).hexdigest()
        (generation / "sums.json").write_text(json.dumps(sums))


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in DAMAGE.items() for text in texts])
def test_a_damaged_generation_gives_way_to_the_one_before(tmp_path: Path, name: str, text: str) -> None:
    saved(tmp_path, 1)
    replace(saved(tmp_path, 2), name, text.encode())
    found, said = load(tmp_path)
    assert found is not None
    assert found.state.update == 1
    assert_names(said, "update 2 is damaged", "from update 1")


def test_tensors_that_are_none_are_a_damaged_checkpoint(tmp_path: Path) -> None:
    replace(saved(tmp_path, 1), "model.safetensors", b"\xff" * 100)
    with raises_naming(FolderError, str(tmp_path), "damaged", "delete this folder"):
        load(tmp_path)


def test_a_folder_named_by_other_digits_is_no_generation(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / "²").mkdir()
    assert newest_update(tmp_path) == 1
