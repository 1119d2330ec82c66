"""Weights between a torch model, whose names and shapes the scorer folder holds, and the encoder's dict of arrays."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cappy.training.tpu.encoder import Architecture

Arrays = dict[str, NDArray[Any]]

_LAYER = re.compile(r"^(\w+\.encoder\.layer\.)(\d+)\.(.+)$")


def stack(tensors: Mapping[str, NDArray[Any]]) -> Arrays:
    """The tensors with every layer's `x.encoder.layer.N.y` stacked as `x.encoder.layer.*.y`, (layers, ...)."""
    stacked: Arrays = {}
    layers: dict[str, dict[int, NDArray[Any]]] = {}
    for name, tensor in tensors.items():
        if found := _LAYER.match(name):
            layers.setdefault(f"{found[1]}*.{found[3]}", {})[int(found[2])] = tensor
        else:
            stacked[name] = tensor
    return stacked | {name: np.stack([of[number] for number in sorted(of)]) for name, of in layers.items()}


def unstack(params: Mapping[str, Any]) -> Arrays:
    """The inverse of `stack`: one array per name of the scorer folder, copied to the host, each in its own memory."""
    tensors: Arrays = {}
    for name, array in params.items():
        values = np.array(array)
        if ".*." in name:
            tensors |= {name.replace("*", str(number), 1): value.copy() for number, value in enumerate(values)}
        else:
            tensors[name] = values
    return tensors


def from_torch(tensors: Mapping[str, Tensor]) -> Arrays:
    """Torch's tensors as fp32 arrays, copied: JAX may otherwise share memory with the model."""
    return {name: np.array(tensor.detach().float().cpu().numpy()) for name, tensor in tensors.items()}


def to_torch(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    """Arrays as torch's tensors, which take over their memory."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def decayed(params: Mapping[str, Any], arch: Architecture) -> dict[str, bool]:
    """Which arrays decay: those of two or more dimensions in the scorer folder, so no bias and no norm."""
    return {name: array.ndim - name.startswith(arch.stacked) >= 2 for name, array in params.items()}
