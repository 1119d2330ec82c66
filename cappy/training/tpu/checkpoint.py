"""Where a killed run continues: weights under the scorer folder's names, the optimizer by its path in optax's tree."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from cappy.records.folder import disk_errors
from cappy.training.checkpoint import State
from cappy.training.tpu.engine import Engine
from cappy.training.tpu.weights import Tensors, stack


def save(folder: Path, engine: Engine, state: State, best: Tensors) -> None:
    """Replaces the checkpoint in `folder`, whole or not at all: the older one stands until the newer is complete."""
    temporary = folder.with_name(f"{folder.name}.tmp")
    with disk_errors(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(engine.weights(), temporary / "model.safetensors")
        save_file(best, temporary / "best.safetensors")
        save_file(_named(engine.moments), temporary / "optimizer.safetensors")
        (temporary / "state.json").write_text(json.dumps(asdict(state)))
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        generation = folder / f"{state.update:09d}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(generation, ignore_errors=True)
        temporary.rename(generation)
        for older in folder.iterdir():
            if older != generation:
                shutil.rmtree(older)


def load(folder: Path, engine: Engine) -> tuple[State, Tensors] | None:
    """Puts the newest checkpoint into the engine; its state and best weights, or None if there is none.

    It may come from another number of devices.
    """
    generations = sorted(folder.iterdir()) if folder.is_dir() else []
    if not generations:
        return None
    newest = generations[-1]
    saved = load_file(newest / "optimizer.safetensors")
    moments = jax.tree_util.tree_map_with_path(lambda path, _: saved[jax.tree_util.keystr(path)], engine.moments)
    engine.restore(stack(load_file(newest / "model.safetensors")), moments)
    return State(**json.loads((newest / "state.json").read_text())), load_file(newest / "best.safetensors")


def _named(moments: Any) -> Tensors:
    leaves = jax.tree_util.tree_leaves_with_path(moments)
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in leaves}
