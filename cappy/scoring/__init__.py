"""Scoring: computes the scores of (instruction, response) pairs, always with `Scorer.score`."""

from pathlib import Path
from typing import TYPE_CHECKING

from cappy.scoring.config import Precision

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cappy.scoring.scorer import Scorer

__all__ = ["Precision", "Scorer", "training_prompts"]

TRAINED_ON = "trained_on.u64"


def training_prompts(folder: str | Path) -> "NDArray[np.uint64]":
    """The sorted `prompt_hash` of every prompt that the scorer in `folder` was trained on; empty if not recorded."""
    import numpy as np

    path = Path(folder) / TRAINED_ON
    return np.fromfile(path, dtype="<u8") if path.is_file() else np.empty(0, dtype="<u8")


def __getattr__(name: str) -> object:
    """Imports torch at the first use of `Scorer`, not with this package."""
    if name == "Scorer":
        from cappy.scoring.scorer import Scorer

        return Scorer
    raise AttributeError(name)
