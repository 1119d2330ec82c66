"""The precision that the body of a scorer runs in; head and activation run in fp32 always.

In bf16 on a CPU, torch puts the weights of a linear map into the order that the matrix instructions read at every call.
`Prepacked` does it once, by the operators that torch's own compiler calls for the same purpose; they have no public
name, so `has_prepacking` tries them, and scoring does without where they are missing.
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from cappy.errors import ConfigError, shown
from cappy.scoring.config import ChosenPrecision, Precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
        mapped: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, *how)
        return mapped


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


def choose(precision: Precision, device: torch.device) -> ChosenPrecision:
    """`auto` is bf16 where the device has instructions for it, else fp32; ConfigError for any other word."""
    if precision not in get_args(Precision):
        raise ConfigError(f"precision: must be one of {', '.join(get_args(Precision))}, got {shown(precision)}")
    if precision == "auto":
        return "bf16" if has_bf16(device) else "fp32"
    return precision


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies matrices of bf16 by instructions of its own (AMX or AVX512-BF16 of a CPU)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return False


def lower_matrices(model: "PreTrainedModel") -> None:
    """Weights of an encoder's linear maps in bf16; norms and embeddings stay fp32, and so does what is added up."""
    encoder = model.base_model.encoder
    if next(model.parameters()).device.type == "cpu" and has_prepacking():
        prepack(encoder.layer, gelu=model.config.hidden_act == "gelu")
        return
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)


def lower_body(model: "PreTrainedModel") -> None:
    """The whole body in bf16, for encoders of which nothing more is known; what follows it reads and runs in fp32."""
    model.base_model.to(torch.bfloat16)
    for head in _heads(model):
        head.float().register_forward_pre_hook(_widen)


def keep_heads_exact(model: "PreTrainedModel") -> None:
    """Lets what follows the body run in fp32 even where a pass runs under autocast."""
    for head in _heads(model):
        entered: list[Any] = []
        head.register_forward_pre_hook(partial(_enter_exact, entered))
        head.register_forward_hook(partial(_leave_exact, entered), always_call=True)


def _heads(model: "PreTrainedModel") -> list[nn.Module]:
    """What follows the body, its own pooler included."""
    body = model.base_model
    after = [child for child in model.children() if child is not body]
    return after + [child for name, child in body.named_children() if name == "pooler"]


def _enter_exact(entered: list[Any], module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    entered.append(torch.autocast(next(module.parameters(), torch.empty(0)).device.type, enabled=False))
    entered[-1].__enter__()
    return _widen(module, inputs)


def _leave_exact(entered: list[Any], *_: Any) -> None:
    entered.pop().__exit__(None, None, None)


def _widen(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        value.float() if isinstance(value, Tensor) and value.is_floating_point() else value for value in inputs
    )
