"""The precision that the body of a scorer runs in; head and activation run in fp32 always."""

from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from cappy.errors import ConfigError, shown
from cappy.scoring import Precision
from cappy.scoring.prepacked import has_prepacking, prepack

Chosen = Literal["fp32", "bf16"]


def choose(precision: Precision, device: torch.device) -> Chosen:
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
        found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(found.get("amx_bf16") or found.get("avx512_bf16"))
    return False


def lower_matrices(model: Any) -> None:
    """Weights of an encoder's linear maps in bf16; norms and embeddings stay fp32, and so does what is added up."""
    encoder = model.base_model.encoder
    if next(model.parameters()).device.type == "cpu" and has_prepacking():
        prepack(encoder.layer, gelu=model.config.hidden_act == "gelu")
        return
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)


def lower_body(model: Any) -> None:
    """The whole body in bf16, for encoders of which nothing more is known; what follows it reads and runs in fp32."""
    model.base_model.to(torch.bfloat16)
    for head in _heads(model):
        head.float().register_forward_pre_hook(_widen)


def keep_heads_exact(model: Any) -> None:
    """Lets what follows the body run in fp32 even where a pass runs under autocast."""
    for head in _heads(model):
        entered: list[Any] = []
        head.register_forward_pre_hook(partial(_enter_exact, entered))
        head.register_forward_hook(partial(_leave_exact, entered), always_call=True)


def _heads(model: Any) -> list[nn.Module]:
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
