"""What a scorer folder says of itself, and what may not lie in it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

from cappy.errors import FolderError, shown

Head = Literal["mse", "bce"]
HEADS: tuple[Head, ...] = get_args(Head)
Truncation = Literal["middle", "longest_first"]
"""Where a pair that is too long is cut: inside the instruction, or at the end of the longer text, as published."""
TRUNCATIONS: tuple[Truncation, ...] = get_args(Truncation)

MAX_LENGTH = 512

# The activation is recorded where sentence-transformers, vLLM and we look for it, so that one folder gives one number.
_ACTIVATIONS: Mapping[Head, str] = {
    "mse": "torch.nn.modules.linear.Identity",
    "bce": "torch.nn.modules.activation.Sigmoid",
}


def head_of(config: Any) -> Head:
    """The head that a folder's configuration states; the published scorer states none and is `mse`."""
    recorded = (getattr(config, "cappy", None) or {}).get("head")
    for head in HEADS:
        if head == recorded:
            return head
    activation = (getattr(config, "sentence_transformers", None) or {}).get("activation_fn", "")
    return "bce" if activation.endswith("Sigmoid") else "mse"


def mark_head(config: Any, head: Head, max_length: int, truncation: Truncation = "middle") -> None:
    """Records head, activation, length and, unless it is the usual one, truncation in a configuration."""
    config.cappy = {"head": head, "max_length": max_length}
    if truncation != "middle":
        config.cappy["truncation"] = truncation
    config.sentence_transformers = {"activation_fn": _ACTIVATIONS[head]}
    # What makes transformers' own text-classification pipeline apply the identity, or the sigmoid.
    config.problem_type = "regression" if head == "mse" else "multi_label_classification"


def refuse_labels(folder: Path, config: Any) -> None:
    """FolderError where a configuration has another number of labels than one."""
    if config.num_labels != 1:
        raise FolderError(f"{folder}: has {config.num_labels} labels; a scorer has one")


class Recorded(TypedDict):
    """What a folder's configuration says that transformers does not ask for."""

    head: Head
    max_length: int
    truncation: Truncation


def recorded(config: Any) -> Recorded:
    """Head, length and truncation of a configuration, each with its default where it is not recorded."""
    return {"head": head_of(config), "max_length": max_length_of(config), "truncation": truncation_of(config)}


def truncation_of(config: Any) -> Truncation:
    """The recorded truncation, else `middle`; FolderError where it is none that is known."""
    recorded = (getattr(config, "cappy", None) or {}).get("truncation", "middle")
    for truncation in TRUNCATIONS:
        if truncation == recorded:
            return truncation
    known = " or ".join(TRUNCATIONS)
    raise FolderError(f"config.json: cappy.truncation must be {known}, got {shown(json.dumps(recorded))}")


def max_length_of(config: Any) -> int:
    """The recorded length, else what the positions allow (RoBERTa keeps two of them for itself), at most 512."""
    recorded = (getattr(config, "cappy", None) or {}).get("max_length")
    if recorded is not None and (not isinstance(recorded, int) or recorded < 8):
        raise FolderError(f"config.json: cappy.max_length must be at least 8 tokens, got {shown(json.dumps(recorded))}")
    positions = getattr(config, "max_position_embeddings", None) or MAX_LENGTH + 2
    reserved = 2 if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert") else 0
    return int(recorded or min(MAX_LENGTH, positions - reserved))
