"""Forward passes of a batch of pairs: padded, or packed without padding; in fp32 or in bf16.

Encoders with BERT's architecture run packed (`packed_logits`), without computing padding. The modules of transformers
are called one by one, so weights and results are the same as in its own forward, with two differences: attention runs
over segments of pairs of equal length without a mask (on a GPU in bf16: one kernel for any lengths), and the last layer
computes only the first token of each pair, which is all that the head reads.

Head and activation run in fp32 whatever the precision of the body. In bf16 on a CPU, torch reorders the weights of a
linear layer for the matrix instructions at every call. `PrepackedLinear` does it once, with the operators that torch's
compiler uses. They are not public, so `has_prepacking` tries them, and without them scoring is only slower.
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
    """Indices in batches of similar length, longest first, with at most `budget` padded tokens (or a single pair)."""
    batch: list[int] = []
    for index in sorted(range(len(encoded)), key=lambda i: -len(encoded[i].ids)):
        if batch and (len(batch) + 1) * len(encoded[batch[0]].ids) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def padding_token_id(config: "PreTrainedConfig") -> int | None:
    """The id of the padding token, from which the model derives the last token or the positions of a pair.

    None if the model has no valid one, or if its head reads the last position including padding (XLNet): then pairs are
    computed one at a time.
    """
    text = config.get_text_config()
    pad = None if getattr(text, "summary_type", "") == "last" else getattr(text, "pad_token_id", None)
    return pad if isinstance(pad, int) and 0 <= pad < text.vocab_size else None


def collate(batch: Sequence[EncodedPair], *, pad: int, token_types: bool, device: torch.device) -> dict[str, Tensor]:
    """Right-padded inputs (pairs, longest) on the device: ids, mask and, with `token_types`, token types."""
    longest = max(len(pair.ids) for pair in batch)
    padding = [longest - len(pair.ids) for pair in batch]
    inputs = {
        "input_ids": torch.tensor([[*pair.ids, *(pad,) * count] for pair, count in zip(batch, padding, strict=True)]),
        "attention_mask": torch.tensor(
            [[1] * len(pair.ids) + [0] * count for pair, count in zip(batch, padding, strict=True)]
        ),
    }
    if token_types:
        inputs["token_type_ids"] = torch.tensor(
            [[*pair.types, *(0,) * count] for pair, count in zip(batch, padding, strict=True)]
        )
    return {name: value.to(device) for name, value in inputs.items()}


PACKABLE_MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "camembert")
"""Model types of transformers that `packed_logits` supports."""
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert")
"""Model types whose positions count the non-padding tokens, starting after the padding id."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Positions of packed pairs: the row of each first token, and (pairs, length) of segments of equal length."""

    lengths: tuple[int, ...]
    starts: Tensor
    segments: tuple[tuple[int, int], ...]
    ends: Tensor
    """(pairs + 1,) int32: 0 and the row after each pair."""


class _OutputLayer(Protocol):
    """The output layer of attention or feed-forward: linear, dropout, residual and layer norm."""

    dense: nn.Linear

    def __call__(self, hidden: Tensor, residual: Tensor, /) -> Tensor: ...


class _IntermediateLayer(Protocol):
    dense: nn.Linear

    def __call__(self, hidden: Tensor, /) -> Tensor: ...


class _Projections(Protocol):
    num_attention_heads: int
    dropout: nn.Dropout
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    qkv: nn.Linear
    """Replaces the three layers after `_prepack`."""


class _Attention(Protocol):
    self: _Projections
    output: _OutputLayer


class _Layer(Protocol):
    """The parts of a BERT layer that are used here."""

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
    """The parts of a BERT encoder that are used here."""

    embeddings: _Embeddings
    encoder: _Layers
    pooler: Callable[[Tensor], Tensor] | None


def can_pack(model: "PreTrainedModel") -> bool:
    """Whether `packed_logits` supports the model's architecture."""
    config = model.config
    return config.model_type in PACKABLE_MODEL_TYPES and not config.is_decoder and hasattr(model, "classifier")


def packed_logits(model: "PreTrainedModel", batch: Sequence[EncodedPair], device: torch.device) -> Tensor:
    """Logits (pairs,) in fp32; linear layers run in the precision of their weights, dropout only in training."""
    order = sorted(range(len(batch)), key=lambda index: -len(batch[index].ids))
    batch = [batch[index] for index in order]
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
    segments = tuple((len(list(equal)), length) for length, equal in groupby(lengths))
    return _Layout(lengths=lengths, starts=ends[:-1].long(), segments=segments, ends=ends)


def _embed(body: _Body, config: "PreTrainedConfig", batch: Sequence[EncodedPair], layout: _Layout) -> Tensor:
    """The input of the encoder's first layer, (tokens, hidden)."""
    device = layout.starts.device
    ids = torch.tensor([token for pair in batch for token in pair.ids], device=device)
    has_token_types = (config.type_vocab_size or 0) > 1
    if has_token_types:
        types = torch.tensor([token_type for pair in batch for token_type in pair.types], device=device)
    else:
        types = torch.zeros_like(ids)
    start = layout.starts.repeat_interleave(layout.ends.diff())
    if config.model_type in _OFFSET_POSITIONS:
        mask = (ids != config.pad_token_id).long()
        total = torch.cat([mask.new_zeros(1), mask.cumsum(0)])
        positions = (total[1:] - total[start]) * mask + config.pad_token_id
    else:
        positions = torch.arange(len(ids), device=device) - start
    return body.embeddings(input_ids=ids[None], token_type_ids=types[None], position_ids=positions[None])[0]


def _run_layer(layer: _Layer, hidden: Tensor, layout: _Layout, *, last: bool) -> Tensor:
    """The output of a layer: (tokens, hidden), or (pairs, hidden) for the last layer."""
    projections = layer.attention.self
    dtype = layer.attention.output.dense.weight.dtype
    rows = hidden.to(dtype)
    query_rows, residual = (rows[layout.starts], hidden[layout.starts]) if last else (rows, hidden)
    query, key, value = _project(projections, query_rows, rows)
    dropout = projections.dropout.p if layer.training else 0.0
    mixed = _attend(query, key, value, layout, single=last, dropout=dropout)
    attended = layer.attention.output(mixed.flatten(1), residual)
    return layer.output(layer.intermediate(attended.to(dtype)), attended)


def _project(projections: _Projections, query_rows: Tensor, rows: Tensor) -> Sequence[Tensor]:
    """Queries of `query_rows`, keys and values of `rows`, (rows, heads, size) each."""
    heads = projections.num_attention_heads
    if hasattr(projections, "qkv"):
        joined: Tensor = projections.qkv(rows)
        return joined.view(len(rows), 3, heads, -1).unbind(1)
    inputs = ((projections.query, query_rows), (projections.key, rows), (projections.value, rows))
    return [project(x).view(len(x), heads, -1) for project, x in inputs]


def _attend(query: Tensor, key: Tensor, value: Tensor, layout: _Layout, *, single: bool, dropout: float) -> Tensor:
    """Attention within each pair: (rows, heads, size) from inputs of that shape; `single`: one query per pair."""
    if query.is_cuda and query.dtype is torch.bfloat16 and not dropout:
        from torch.nn.attention.varlen import varlen_attn

        longest = max(layout.lengths)
        query_ends = (
            torch.arange(len(layout.lengths) + 1, dtype=torch.int32, device=query.device) if single else layout.ends
        )
        # varlen_attn returns a tuple only with `return_aux`.
        return cast(Tensor, varlen_attn(query, key, value, query_ends, layout.ends, 1 if single else longest, longest))
    shape, attended, row, query_row = query.shape[1:], [], 0, 0
    for pairs, length in layout.segments:
        rows, queries = pairs * length, pairs if single else pairs * length
        q = query[query_row : query_row + queries].view(pairs, -1, *shape).transpose(1, 2)
        k, v = (tensor[row : row + rows].view(pairs, length, *shape).transpose(1, 2) for tensor in (key, value))
        attended.append(scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(0, 1))
        row, query_row = row + rows, query_row + queries
    return torch.cat(attended) if len(attended) > 1 else attended[0]


PREPACKED_ROWS = 8192
"""Number of input rows for which the order of the weights is optimised; inputs may have any number of rows."""
Activation = Literal["none", "gelu"]


@cache
def has_prepacking() -> bool:
    """Whether torch has the operators and the processor has the instructions; tries them on a small layer."""
    try:
        with torch.inference_mode():
            PrepackedLinear(nn.Linear(2, 2))(torch.zeros(1, 2, dtype=torch.bfloat16))
    except (AttributeError, RuntimeError):
        return False
    return True


class PrepackedLinear(nn.Module):
    """Equivalent to a `Linear` in bf16, optionally with an exact GELU after it; without gradients."""

    def __init__(self, linear: nn.Linear, activation: Activation = "none") -> None:
        super().__init__()
        weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(torch.bfloat16), PREPACKED_ROWS)
        self.register_buffer("weight", weight, persistent=False)
        self.bias = None if linear.bias is None else linear.bias.detach().to(torch.bfloat16)
        self.activation = activation

    def forward(self, rows: Tensor) -> Tensor:
        """(rows, out) in bf16 from (rows, in) in bf16."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, self.activation, [], "none")
        return output


def _prepack(layers: Sequence[_Layer], *, gelu: bool) -> None:
    """Replaces every linear layer of BERT layers with a `PrepackedLinear`; `gelu`: their activation is an exact GELU.

    Queries, keys and values are joined into one layer, `qkv`, except in the last layer, which needs only the first
    query of each pair.
    """
    for layer in layers:
        projections = layer.attention.self
        if layer is not layers[-1]:
            projections.qkv = _concatenate(projections.query, projections.key, projections.value)
            for name in ("query", "key", "value"):
                setattr(projections, name, None)
        if gelu:
            layer.add_module("intermediate", PrepackedLinear(layer.intermediate.dense, "gelu"))
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, PrepackedLinear(child))


def _concatenate(*layers: nn.Linear) -> nn.Linear:
    """One linear layer whose output is the concatenation of the outputs of these."""
    joined = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers))
    joined.weight.data = torch.cat([layer.weight.detach() for layer in layers])
    joined.bias.data = torch.cat([layer.bias.detach() for layer in layers])
    return joined


def choose_precision(precision: Precision, device: torch.device) -> ChosenPrecision:
    """Resolves `auto`: bf16 if the device has instructions for it, else fp32. Raises ConfigError for unknown values."""
    if precision not in get_args(Precision):
        raise ConfigError(f"precision: must be one of {', '.join(get_args(Precision))}, got {quote(precision)}")
    if precision == "auto":
        return "bf16" if has_bf16(device) else "fp32"
    return precision


def has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for matrix products in bf16 (on a CPU: AMX or AVX512-BF16)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return False


def convert_matrices_to_bf16(model: "PreTrainedModel") -> None:
    """Converts an encoder's linear layers to bf16; norms, embeddings and residuals stay in fp32."""
    encoder = model.base_model.encoder
    if next(model.parameters()).device.type == "cpu" and has_prepacking():
        _prepack(encoder.layer, gelu=model.config.hidden_act == "gelu")
        return
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)


def convert_body_to_bf16(model: "PreTrainedModel") -> None:
    """Converts the whole body to bf16, for encoders of unknown architecture; the head runs in fp32."""
    model.base_model.to(torch.bfloat16)
    for head in _heads(model):
        head.float().register_forward_pre_hook(_to_fp32)


def keep_heads_in_fp32(model: "PreTrainedModel") -> None:
    """Makes the modules after the body run in fp32 even under autocast."""
    for head in _heads(model):
        contexts: list[AbstractContextManager[object]] = []
        head.register_forward_pre_hook(partial(_disable_autocast, contexts))
        head.register_forward_hook(partial(_restore_autocast, contexts), always_call=True)


def _heads(model: "PreTrainedModel") -> list[nn.Module]:
    """The modules after the body, including its own pooler."""
    body = model.base_model
    after = [child for child in model.children() if child is not body]
    return after + [child for name, child in body.named_children() if name == "pooler"]


def _disable_autocast(
    contexts: list[AbstractContextManager[object]], module: nn.Module, inputs: tuple[object, ...]
) -> tuple[object, ...]:
    contexts.append(torch.autocast(next(module.parameters(), torch.empty(0)).device.type, enabled=False))
    contexts[-1].__enter__()
    return _to_fp32(module, inputs)


def _restore_autocast(contexts: list[AbstractContextManager[object]], *_: object) -> None:
    contexts.pop().__exit__(None, None, None)


def _to_fp32(_: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(
        value.float() if isinstance(value, Tensor) and value.is_floating_point() else value for value in inputs
    )
