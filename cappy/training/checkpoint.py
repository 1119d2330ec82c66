"""Where a killed training run continues: weights and optimizer as safetensors, the rest as JSON."""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cappy.records.folder import disk_errors


@dataclass
class State:
    """How far the loop is; `log` holds one entry per check of the validation instances."""

    update: int = 0
    best_pick: float = -1.0
    best_update: int = 0
    checks_since_best: int = 0
    stopped: bool = False
    running_loss: float = 0.0
    log: list[dict[str, float]] = field(default_factory=list)


def save(folder: Path, model: Any, optimizer: torch.optim.AdamW, state: State, best: dict[str, Tensor]) -> None:
    """Replaces the checkpoint in `folder`, whole or not at all: the older one stands until the newer is complete."""
    temporary = folder.with_name(f"{folder.name}.tmp")
    with disk_errors(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(_contiguous(model.state_dict()), temporary / "model.safetensors")
        save_file(_contiguous(best), temporary / "best.safetensors")
        save_file(_optimizer_tensors(optimizer), temporary / "optimizer.safetensors")
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


def load(folder: Path, model: Any, optimizer: torch.optim.AdamW) -> tuple[State, dict[str, Tensor]] | None:
    """Puts the newest checkpoint into model and optimizer; its state and best weights, or None if there is none."""
    generations = sorted(folder.iterdir()) if folder.is_dir() else []
    if not generations:
        return None
    newest = generations[-1]
    model.load_state_dict(load_file(newest / "model.safetensors"), strict=False)
    _restore(optimizer, load_file(newest / "optimizer.safetensors"))
    return State(**json.loads((newest / "state.json").read_text())), load_file(newest / "best.safetensors")


def copy_weights(model: Any) -> dict[str, Tensor]:
    """The model's weights as they are now, on the CPU."""
    return _contiguous(model.state_dict())


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _optimizer_tensors(optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    entries = optimizer.state_dict()["state"]
    return _contiguous({f"{index}.{name}": value for index, entry in entries.items() for name, value in entry.items()})


def _restore(optimizer: torch.optim.AdamW, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
