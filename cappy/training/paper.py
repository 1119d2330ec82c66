"""The published finetuning (Cappy's cappy_bigbench.py, 2023), as far as settings say it.

Rows of all instances in one order, 128 to an update, 102,400 in all however many there are; squared error on a raw
regression; AdamW without weight decay, gradients not clipped; the learning rate as the published code moved it; the
last weights kept, nothing looked at on the way. A pair beyond 512 tokens loses the end of its longer text
(`TRUNCATION`); the scorer's folder records it, so that it is scored as it was trained. Still ours: the random draws.
The settings of the published pretraining are not known in full: there the preset sets the same, and
`recipes/pretrain-360m.yaml` says what is known besides.
"""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cappy.scoring.config import Truncation

TRUNCATION: "Truncation" = "longest_first"
"""The published code's `truncation=True` (cappy_bigbench.py, lines 73 to 79)."""
PAPER: Mapping[str, Any] = {
    "unit": "row",
    "batch_instances": 128,
    "train_rows": 102_400,
    "learning_rate": 2e-5,
    "warmup": 0.1,
    "schedule": "published",
    "weight_decay": 0.0,
    "clip": 0.0,
    "relative": 0.0,
    "listwise": 0.0,
    "keep": "last",
    "checks": 1,
    "head": "mse",
    "max_length": 512,
}


def with_preset(given: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The settings that were given, and the preset's for those of `known` that were not.

    Whatever is given wins, also where it is a setting's default. `epochs` stand in the place of `train_rows`.
    """
    if given.get("preset") != "paper":
        return dict(given)
    own = {name: value for name, value in PAPER.items() if name in known}
    if "epochs" in given:
        own.pop("train_rows", None)
    return {**own, **given}
