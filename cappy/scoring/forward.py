"""How a batch of pairs passes through the model: padded for transformers or packed end to end, in fp32 or in bf16.

Encoders of BERT's build run over the tokens alone (`packed_logits`), and nothing is multiplied for padding. The modules
are those of transformers, called one by one, so weights and numbers are the same as in its own forward. Two things
differ. Attention runs over stretches of pairs of equal length, without a mask (on a GPU in bf16: one kernel for any
lengths). And the last layer works for the first token of each pair, which is all that the head reads.

Head and activation run in fp32 whatever the body runs in. In bf16 on a CPU, torch puts the weights of a linear map into
the order that the matrix instructions read at every call. `PrepackedLinear` does it once, by the operators that torch's
own compiler calls for the same purpose; they have no public name, so `has_prepacking` tries them, and scoring does
without where they are missing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Literal, Protocol, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from cappy.errors import ConfigError, quote
from cappy.scoring.config import ChosenPrecision, Precision
from cappy.scoring.encoding import EncodedPair

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def batch_by_length(encoded: Sequence[EncodedPair], budget: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, padded tokens within `budget` (or a single pair)."""
    batch: list[int] = []
    for index in sorted(range(len(encoded)), key=lambda i: -len(encoded[i].ids)):
        if batch and (len(batch) + 1) * len(encoded[batch[0]].ids) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def padding_token_id(config: "PreTrainedConfig") -> int | None:
    """What pads pairs of different lengths: the model's own padding, by which it finds its last token or positions.

    None where it has none, or one that is not a token, or where its head reads the last place, padding or not (XLNet):
    its pairs are computed one at a time.
    """
    text = config.get_text_config()
    pad = None if getattr(text, "summary_type", "") == "last" else getattr(text, "pad_token_id", None)
    return pad if isinstance(pad, int) and 0 <= pad < text.vocab_size else None


def collate(batch: Sequence[EncodedPair], *, pad: int, types: bool, device: torch.device) -> dict[str, Tensor]:
    """Right-padded inputs (pairs, longest): ids, mask and, where the model knows them, token types."""
    longest = max(len(pair.ids) for pair in batch)
    padding = [longest - len(pair.ids) for pair in batch]
    inputs = {
        "input_ids": torch.tensor([[*pair.ids, *(pad,) * short] for pair, short in zip(batch, padding, strict=True)]),
        "attention_mask": torch.tensor(
            [[1] * len(pair.ids) + [0] * short for pair, short in zip(batch, padding, strict=True)]
        ),
    }
    if types:
        inputs["token_type_ids"] = torch.tensor(
            [[*pair.types, *(0,) * short] for pair, short in zip(batch, padding, strict=True)]
        )
    return {name: value.to(device) for name, value in inputs.items()}


FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert")
_COUNTED = ("roberta", "xlm-roberta", "camembert")
"""Families whose positions count the tokens that are not padding, from the padding's own number on."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where pairs lie: the row of each one's first token, and (pairs, tokens of each) for stretches of equal length."""

    lengths: tuple[int, ...]
    starts: Tensor
    stretches: tuple[tuple[int, int], ...]
    ends: Tensor
    """(pairs + 1,) int32: 0 and the row after each pair."""


class _OutputLayer(Protocol):
    """What follows attention, or the wide map: a linear map, dropout, and the norm of the sum with what went in."""

    dense: nn.Linear

    def __call__(self, hidden: Tensor, kept: Tensor, /) -> Tensor: ...


class _IntermediateLayer(Protocol):
    dense: nn.Linear

    def __call__(self, hidden: Tensor, /) -> Tensor: ...


class _Projections(Protocol):
    num_attention_heads: int
    dropout: nn.Dropout
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    together: nn.Linear
    """In the place of the three, where `_prepack` joined them."""


class _Attention(Protocol):
    self: _Projections
    output: _OutputLayer


class _Layer(Protocol):
    """What is used of a layer of BERT's build."""

    attention: _Attention
    intermediate: _IntermediateLayer
    output: _OutputLayer
    training: bool

    def modules(self) -> Iterator[nn.Module]: ...

    def add_module(self, name: str, module: nn.Module) -> None: ...


class _Embeddings(Protocol):
    def __call__(self, *, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor) -> Tensor: ...


class _Layers(Protocol):
    layer: Sequence[_Layer]


class _Body(Protocol):
    """What is used of an encoder of BERT's build."""

    embeddings: _Embeddings
    encoder: _Layers
    pooler: Callable[[Tensor], Tensor] | None


def can_pack(model: "PreTrainedModel") -> bool:
    """Whether this module knows the model's build."""
    config = model.config
    return config.model_type in FAMILIES and not config.is_decoder and hasattr(model, "classifier")


def packed_logits(model: "PreTrainedModel", batch: Sequence[EncodedPair], device: torch.device) -> Tensor:
    """Logits (pairs,) in fp32; linear maps run in the precision of their weights, dropout where the model trains."""
    order = sorted(range(len(batch)), key=lambda number: -len(batch[number].ids))
    batch = [batch[number] for number in order]
    body: _Body = model.base_model
    layout = _build_layout(batch, device)
    hidden = _embed(body, model.config, batch, layout)
    layers = body.encoder.layer
    for layer in layers:
        hidden = _run_layer(layer, hidden, layout, last=layer is layers[-1])
    first = hidden.float()[:, None]
    logits: Tensor = model.classifier(first if body.pooler is None else model.dropout(body.pooler(first))).squeeze(-1)
    return logits[torch.tensor(order, device=device).argsort()]


def _build_layout(batch: Sequence[EncodedPair], device: torch.device) -> _Layout:
    lengths = tuple(len(pair.ids) for pair in batch)
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    stretches = tuple((len(list(equal)), length) for length, equal in groupby(lengths))
    return _Layout(lengths=lengths, starts=ends[:-1].long(), stretches=stretches, ends=ends)


def _embed(body: _Body, config: "PreTrainedConfig", batch: Sequence[EncodedPair], layout: _Layout) -> Tensor:
    """(tokens, hidden): what the encoder's first layer reads."""
    device = layout.starts.device
    ids = torch.tensor([token for pair in batch for token in pair.ids], device=device)
    known = (config.type_vocab_size or 0) > 1
    types = torch.tensor([t for pair in batch for t in pair.types], device=device) if known else torch.zeros_like(ids)
    before = layout.starts.repeat_interleave(layout.ends.diff())
    if config.model_type in _COUNTED:
        counted = (ids != config.pad_token_id).long()
        total = torch.cat([counted.new_zeros(1), counted.cumsum(0)])
        positions = (total[1:] - total[before]) * counted + config.pad_token_id
    else:
        positions = torch.arange(len(ids), device=device) - before
    return body.embeddings(input_ids=ids[None], token_type_ids=types[None], position_ids=positions[None])[0]


def _run_layer(layer: _Layer, hidden: Tensor, layout: _Layout, *, last: bool) -> Tensor:
    """(tokens, hidden), or (pairs, hidden) of the last layer."""
    projections = layer.attention.self
    dtype = layer.attention.output.dense.weight.dtype
    narrow = hidden.to(dtype)
    asking, kept = (narrow[layout.starts], hidden[layout.starts]) if last else (narrow, hidden)
    query, key, value = _project(projections, asking, narrow)
    dropout = projections.dropout.p if layer.training else 0.0
    mixed = _attend(query, key, value, layout, single=last, dropout=dropout)
    attended = layer.attention.output(mixed.flatten(1), kept)
    return layer.output(layer.intermediate(attended.to(dtype)), attended)


def _project(projections: _Projections, asking: Tensor, narrow: Tensor) -> Sequence[Tensor]:
    """Queries of the rows `asking`, keys and values of all, (rows, heads, size) each."""
    heads = projections.num_attention_heads
    if hasattr(projections, "together"):
        joined: Tensor = projections.together(narrow)
        return joined.view(len(narrow), 3, heads, -1).unbind(1)
    maps = ((projections.query, asking), (projections.key, narrow), (projections.value, narrow))
    return [project(rows).view(len(rows), heads, -1) for project, rows in maps]


def _attend(query: Tensor, key: Tensor, value: Tensor, layout: _Layout, *, single: bool, dropout: float) -> Tensor:
    """(rows, heads, size) from queries, keys and values of that shape; `single`: one query per pair."""
    if query.is_cuda and query.dtype is torch.bfloat16 and not dropout:
        from torch.nn.attention.varlen import varlen_attn

        longest = max(layout.lengths)
        asked = torch.arange(len(layout.lengths) + 1, dtype=torch.int32, device=query.device) if single else layout.ends
        # A pair only where `return_aux` is asked for.
        return cast(Tensor, varlen_attn(query, key, value, asked, layout.ends, 1 if single else longest, longest))
    shape, attended, row, asked_row = query.shape[1:], [], 0, 0
    for pairs, length in layout.stretches:
        rows, queries = pairs * length, pairs if single else pairs * length
        q = query[asked_row : asked_row + queries].view(pairs, -1, *shape).transpose(1, 2)
        k, v = (whole[row : row + rows].view(pairs, length, *shape).transpose(1, 2) for whole in (key, value))
        attended.append(scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(0, 1))
        row, asked_row = row + rows, asked_row + queries
    return torch.cat(attended) if len(attended) > 1 else attended[0]


ROWS = 8192
"""Tokens of a pass that the order is best for; any number may come."""
After = Literal["none", "gelu"]


@cache
def has_prepacking() -> bool:
    """Whether this torch has the operators and this processor the instructions; found out by trying."""
    try:
        with torch.inference_mode():
            PrepackedLinear(nn.Linear(2, 2))(torch.zeros(1, 2, dtype=torch.bfloat16))
    except (AttributeError, RuntimeError):
        return False
    return True


class PrepackedLinear(nn.Module):
    """Computes what a `Linear` in bf16 computes, and an exact GELU after it where `after` says so; no gradients."""

    def __init__(self, linear: nn.Linear, after: After = "none") -> None:
        super().__init__()
        weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(torch.bfloat16), ROWS)
        self.register_buffer("weight", weight, persistent=False)
        self.bias = None if linear.bias is None else linear.bias.detach().to(torch.bfloat16)
        self.after = after

    def forward(self, rows: Tensor) -> Tensor:
        """(rows, out) in bf16 from (rows, in) in bf16."""
        mapped: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, self.after, [], "none")
        return mapped


def _prepack(layers: Sequence[_Layer], *, gelu: bool) -> None:
    """Puts a `PrepackedLinear` in the place of every linear map in layers of BERT's build; `gelu`: theirs is exact.

    Queries, keys and values of all layers but the last, which asks for the first token alone, are one map, `together`.
    """
    for layer in layers:
        projections = layer.attention.self
        if layer is not layers[-1]:
            projections.together = _concatenate(projections.query, projections.key, projections.value)
            for name in ("query", "key", "value"):
                setattr(projections, name, None)
        if gelu:
            layer.add_module("intermediate", PrepackedLinear(layer.intermediate.dense, "gelu"))
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, PrepackedLinear(child))


def _concatenate(*maps: nn.Linear) -> nn.Linear:
    """One map that gives what these give, one after the other."""
    joined = nn.Linear(maps[0].in_features, sum(one.out_features for one in maps))
    joined.weight.data = torch.cat([one.weight.detach() for one in maps])
    joined.bias.data = torch.cat([one.bias.detach() for one in maps])
    return joined


def choose_precision(precision: Precision, device: torch.device) -> ChosenPrecision:
    """`auto` is bf16 where the device has instructions for it, else fp32; ConfigError for any other word."""
    if precision not in get_args(Precision):
        raise ConfigError(f"precision: must be one of {', '.join(get_args(Precision))}, got {quote(precision)}")
    if precision == "auto":
        return "bf16" if has_bf16(device) else "fp32"
    return precision


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies matrices of bf16 by instructions of its own (AMX or AVX512-BF16 of a CPU)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return False


def convert_matrices_to_bf16(model: "PreTrainedModel") -> None:
    """Weights of an encoder's linear maps in bf16; norms and embeddings stay fp32, and so does what is added up."""
    encoder = model.base_model.encoder
    if next(model.parameters()).device.type == "cpu" and has_prepacking():
        _prepack(encoder.layer, gelu=model.config.hidden_act == "gelu")
        return
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)


def convert_body_to_bf16(model: "PreTrainedModel") -> None:
    """The whole body in bf16, for encoders of which nothing more is known; what follows it reads and runs in fp32."""
    model.base_model.to(torch.bfloat16)
    for head in _heads(model):
        head.float().register_forward_pre_hook(_to_fp32)


def keep_heads_in_fp32(model: "PreTrainedModel") -> None:
    """Lets what follows the body run in fp32 even where a pass runs under autocast."""
    for head in _heads(model):
        entered: list[AbstractContextManager[object]] = []
        head.register_forward_pre_hook(partial(_disable_autocast, entered))
        head.register_forward_hook(partial(_restore_autocast, entered), always_call=True)


def _heads(model: "PreTrainedModel") -> list[nn.Module]:
    """What follows the body, its own pooler included."""
    body = model.base_model
    after = [child for child in model.children() if child is not body]
    return after + [child for name, child in body.named_children() if name == "pooler"]


def _disable_autocast(
    entered: list[AbstractContextManager[object]], module: nn.Module, inputs: tuple[object, ...]
) -> tuple[object, ...]:
    entered.append(torch.autocast(next(module.parameters(), torch.empty(0)).device.type, enabled=False))
    entered[-1].__enter__()
    return _to_fp32(module, inputs)


def _restore_autocast(entered: list[AbstractContextManager[object]], *_: object) -> None:
    entered.pop().__exit__(None, None, None)


def _to_fp32(_: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(
        value.float() if isinstance(value, Tensor) and value.is_floating_point() else value for value in inputs
    )
