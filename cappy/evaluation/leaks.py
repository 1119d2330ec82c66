"""Leaks: reported prompts that a scorer was trained on."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cappy.records import Instance, prompt_hash

TrainedOn = Callable[[Path], npt.NDArray[np.uint64]]
"""The hashes of the prompts that the scorer in a folder was trained on."""


def seen_in_training(instances: Sequence[Instance], trained_on: npt.NDArray[np.uint64]) -> int:
    """How many of the instances have a prompt whose hash is among those trained on."""
    prompts = np.array([prompt_hash(instance.instruction) for instance in instances], dtype=np.uint64)
    return int(np.isin(prompts, trained_on).sum())
