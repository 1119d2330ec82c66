"""Weights between a torch model, whose names and shapes the scorer folder holds, and the encoder's dict of arrays."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cappy.training.tpu.encoder import Architecture

Tensors = dict[str, NDArray[Any]]

_LAYER = re.compile(r"^(\w+\.encoder\.layer\.)(\d+)\.(.+)$")


def stack(tensors: Mapping[str, NDArray[Any]]) -> Tensors:
    """The tensors with every layer's `x.encoder.layer.N.y` stacked as `x.encoder.layer.*.y`, (layers, ...)."""
    stacked: Tensors = {}
    layers: dict[str, dict[int, NDArray[Any]]] = {}
    for name, tensor in tensors.items():
        if found := _LAYER.match(name):
            layers.setdefault(f"{found[1]}*.{found[3]}", {})[int(found[2])] = tensor
        else:
            stacked[name] = tensor
    return stacked | {name: np.stack([of[number] for number in sorted(of)]) for name, of in layers.items()}


def unstack(params: Mapping[str, Any]) -> Tensors:
    """The inverse of `stack`: one array per name of the scorer folder, copied to the host."""
    tensors: Tensors = {}
    for name, array in params.items():
        values = np.array(array)
        if ".*." in name:
            tensors |= {name.replace("*", str(number), 1): value for number, value in enumerate(values)}
        else:
            tensors[name] = values
    return tensors


def from_model(model: Any) -> Tensors:
    """The fp32 weights of a torch model, stacked and copied: JAX may otherwise share memory with the model."""
    return stack({name: np.array(tensor.detach().float().cpu().numpy()) for name, tensor in model.state_dict().items()})


def into_model(model: Any, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Puts unstacked tensors into a torch model; every name and shape must be the model's own."""
    model.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(t)) for name, t in tensors.items()})


def decayed(params: Mapping[str, Any], arch: Architecture) -> dict[str, bool]:
    """Which arrays decay: those of two or more dimensions in the scorer folder, so no bias and no norm."""
    return {name: array.ndim - name.startswith(arch.stacked) >= 2 for name, array in params.items()}
