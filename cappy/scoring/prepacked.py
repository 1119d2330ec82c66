"""Linear maps in bf16 on a CPU whose weights lie the way its matrix instructions read them.

torch puts the weights of a bf16 linear map into that order again at every call. These are put there once, by the
operators that torch's own compiler calls for the same purpose; they have no public name, so `has_prepacking` tries
them, and scoring does without where they are missing.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

ROWS = 8192
"""Tokens of a pass that the order is best for; any number may come."""
After = Literal["none", "gelu"]


@cache
def has_prepacking() -> bool:
    """Whether this torch has the operators and this processor the instructions; found out by trying."""
    try:
        with torch.inference_mode():
            Prepacked(nn.Linear(2, 2))(torch.zeros(1, 2, dtype=torch.bfloat16))
    except (AttributeError, RuntimeError):
        return False
    return True


class Prepacked(nn.Module):
    """Computes what a `Linear` in bf16 computes, and an exact GELU after it where `after` says so; no gradients."""

    def __init__(self, linear: nn.Linear, after: After = "none") -> None:
        super().__init__()
        weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(torch.bfloat16), ROWS)
        self.register_buffer("weight", weight, persistent=False)
        self.bias = None if linear.bias is None else linear.bias.detach().to(torch.bfloat16)
        self.after = after

    def forward(self, rows: Tensor) -> Tensor:
        """(rows, out) in bf16 from (rows, in) in bf16."""
        how: tuple[Any, ...] = (self.after, [], "none")
        found: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, *how)
        return found


def prepack(layers: Sequence[Any], *, gelu: bool) -> None:
    """Puts a `Prepacked` in the place of every linear map in layers of BERT's build; `gelu`: theirs is exact.

    Queries, keys and values of all layers but the last, which asks for the first token alone, are one map, `together`.
    """
    for layer in layers:
        projections = layer.attention.self
        if layer is not layers[-1]:
            projections.together = _joined(projections.query, projections.key, projections.value)
            projections.query = projections.key = projections.value = None
        if gelu:
            layer.intermediate = Prepacked(layer.intermediate.dense, "gelu")
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, Prepacked(child))


def _joined(*maps: nn.Linear) -> nn.Linear:
    """One map that gives what these give, one after the other."""
    joined = nn.Linear(maps[0].in_features, sum(one.out_features for one in maps))
    joined.weight.data = torch.cat([one.weight.detach() for one in maps])
    joined.bias.data = torch.cat([one.bias.detach() for one in maps])
    return joined
