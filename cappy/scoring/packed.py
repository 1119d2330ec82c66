"""The packed forward pass: a batch of pairs end to end, without computing padding.

The modules of transformers are called one by one, so weights and results are the same as in its own forward, with two
differences: attention runs over segments of pairs of equal length without a padding mask (on a GPU in bf16: one kernel
for any lengths), and the last layer computes only the first token of each pair, which is all that the head reads.

Packable are BERT and its relatives, MPNet (whose relative position bias depends on the distance of two tokens only) and
ModernBERT (rotary positions start anew at each pair; its local layers mask distant tokens of a pair). All others are
padded: DeBERTa's attention, for one, adds scores of tokens against relative positions, which this pass does not have.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from cappy.scoring.encoding import EncodedPair
from cappy.scoring.model import PrepackedLinear, has_prepacking

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PACKABLE_MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "camembert", "mpnet", "modernbert")
"""Model types of transformers that `packed_logits` supports."""
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet")
"""Model types whose positions count the non-padding tokens, starting after the padding id."""
_PROJECTIONS = {"mpnet": ("q", "k", "v")}
"""Names of the layers for queries, keys and values, where they differ from BERT's."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Positions of packed pairs: the row of each first token, and (pairs, length) of segments of equal length."""

    lengths: tuple[int, ...]
    starts: Tensor
    segments: tuple[tuple[int, int], ...]
    ends: Tensor
    """(pairs + 1,) int32: 0 and the row after each pair."""

    @property
    def positions(self) -> Tensor:
        """(tokens,): the position of each token in its pair, from 0."""
        start = self.starts.repeat_interleave(self.ends.diff())
        return torch.arange(len(start), device=start.device) - start


class _OutputLayer(Protocol):
    """The output layer of attention or feed-forward: linear, dropout, residual and layer norm."""

    dense: nn.Linear

    def __call__(self, hidden: Tensor, residual: Tensor, /) -> Tensor: ...


class _IntermediateLayer(Protocol):
    dense: nn.Linear

    def __call__(self, hidden: Tensor, /) -> Tensor: ...


class _Projections(Protocol):
    """Has linear layers for queries, keys and values, or `qkv` in their place after `_prepack`."""

    num_attention_heads: int
    dropout: nn.Dropout
    qkv: nn.Module
    o: nn.Linear
    """MPNet's output layer."""


class _Attention(Protocol):
    """BERT's attention (`self` and `output`) or MPNet's (`attn`, `dropout` and `LayerNorm`)."""

    self: _Projections
    output: _OutputLayer
    attn: _Projections
    dropout: nn.Dropout
    LayerNorm: nn.LayerNorm


class _Layer(Protocol):
    """The parts of a layer of BERT or MPNet that are used here."""

    attention: _Attention
    intermediate: _IntermediateLayer
    output: _OutputLayer
    training: bool

    def modules(self) -> Iterator[nn.Module]: ...

    def add_module(self, name: str, module: nn.Module) -> None: ...


class _Embeddings(Protocol):
    padding_idx: int

    def __call__(self, *, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor) -> Tensor: ...


class _Layers(Protocol):
    layer: Sequence[_Layer]

    def compute_position_bias(self, hidden: Tensor, /) -> Tensor:
        """MPNet's bias, (1, heads, length, length) for (1, length, ...)."""


class _Body(Protocol):
    """The parts of an encoder of BERT or MPNet that are used here."""

    embeddings: _Embeddings
    encoder: _Layers
    pooler: Callable[[Tensor], Tensor] | None


class _GatedAttention(Protocol):
    Wqkv: nn.Linear
    Wo: nn.Linear
    out_drop: nn.Module
    attention_dropout: float
    head_dim: int


class _GatedLayer(Protocol):
    """The parts of a ModernBERT layer that are used here."""

    attn: _GatedAttention
    attn_norm: nn.Module
    mlp: Callable[[Tensor], Tensor]
    mlp_norm: nn.LayerNorm
    attention_type: str
    training: bool


def can_pack(model: "PreTrainedModel") -> bool:
    """Whether `packed_logits` supports the model's architecture."""
    config = model.config
    is_decoder = getattr(config, "is_decoder", False)
    return config.model_type in PACKABLE_MODEL_TYPES and not is_decoder and hasattr(model, "classifier")


def packed_logits(model: "PreTrainedModel", batch: Sequence[EncodedPair], device: torch.device) -> Tensor:
    """Logits (pairs,) in fp32; linear layers run in the precision of their weights, dropout only in training."""
    order = sorted(range(len(batch)), key=lambda index: -len(batch[index].ids))
    batch = [batch[index] for index in order]
    layout = _build_layout(batch, device)
    compute = _modernbert_logits if model.config.model_type == "modernbert" else _bert_logits
    return compute(model, batch, layout)[torch.tensor(order, device=device).argsort()]


def _build_layout(batch: Sequence[EncodedPair], device: torch.device) -> _Layout:
    lengths = tuple(len(pair.ids) for pair in batch)
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    segments = tuple((len(list(equal)), length) for length, equal in groupby(lengths))
    return _Layout(lengths=lengths, starts=ends[:-1].long(), segments=segments, ends=ends)


def _bert_logits(model: "PreTrainedModel", batch: Sequence[EncodedPair], layout: _Layout) -> Tensor:
    """Logits (pairs,) of BERT, its relatives and MPNet."""
    body: _Body = model.base_model
    hidden = _embed(body, model.config, batch, layout)
    bias = None
    if model.config.model_type == "mpnet":
        bias = body.encoder.compute_position_bias(hidden[None, : layout.lengths[0]])[0]
    names = _PROJECTIONS.get(model.config.model_type, ("query", "key", "value"))
    layers = body.encoder.layer
    for layer in layers:
        hidden = _run_layer(layer, hidden, layout, names=names, bias=bias, last=layer is layers[-1])
    first = hidden.float()[:, None]
    logits: Tensor = model.classifier(first if body.pooler is None else model.dropout(body.pooler(first))).squeeze(-1)
    return logits


def _embed(body: _Body, config: "PreTrainedConfig", batch: Sequence[EncodedPair], layout: _Layout) -> Tensor:
    """The input of the encoder's first layer, (tokens, hidden)."""
    ids = _token_ids(batch, layout)
    if (getattr(config, "type_vocab_size", 0) or 0) > 1:
        types = torch.tensor([token_type for pair in batch for token_type in pair.types], device=ids.device)
    else:
        types = torch.zeros_like(ids)
    positions = layout.positions
    if config.model_type in _OFFSET_POSITIONS:
        # MPNet's padding id is fixed in its embeddings, whatever its configuration says.
        pad = body.embeddings.padding_idx if config.model_type == "mpnet" else config.pad_token_id
        mask = (ids != pad).long()
        total = torch.cat([mask.new_zeros(1), mask.cumsum(0)])
        start = layout.starts.repeat_interleave(layout.ends.diff())
        positions = (total[1:] - total[start]) * mask + pad
    return body.embeddings(input_ids=ids[None], token_type_ids=types[None], position_ids=positions[None])[0]


def _token_ids(batch: Sequence[EncodedPair], layout: _Layout) -> Tensor:
    return torch.tensor([token for pair in batch for token in pair.ids], device=layout.starts.device)


def _run_layer(
    layer: _Layer, hidden: Tensor, layout: _Layout, *, names: Sequence[str], bias: Tensor | None, last: bool
) -> Tensor:
    """The output of a layer: (tokens, hidden), or (pairs, hidden) for the last layer."""
    projections, output = _split_attention(layer.attention)
    dtype = layer.output.dense.weight.dtype
    rows = hidden.to(dtype)
    query_rows, residual = (rows[layout.starts], hidden[layout.starts]) if last else (rows, hidden)
    query, key, value = _project(projections, names, query_rows, rows)
    dropout = projections.dropout.p if layer.training else 0.0
    mixed = _attend(query, key, value, layout, single=last, dropout=dropout, bias=bias)
    attended = output(mixed.flatten(1), residual)
    return layer.output(layer.intermediate(attended.to(dtype)), attended)


def _split_attention(attention: _Attention) -> tuple[_Projections, Callable[[Tensor, Tensor], Tensor]]:
    """The projections of a layer's attention, and its output layer as a function of (mixed values, residual)."""
    if not hasattr(attention, "attn"):
        return attention.self, attention.output
    return attention.attn, lambda mixed, residual: attention.LayerNorm(
        attention.dropout(attention.attn.o(mixed)) + residual
    )


def _project(projections: _Projections, names: Sequence[str], query_rows: Tensor, rows: Tensor) -> Sequence[Tensor]:
    """Queries of `query_rows`, keys and values of `rows`, (rows, heads, size) each."""
    heads = projections.num_attention_heads
    if hasattr(projections, "qkv"):
        joined: Tensor = projections.qkv(rows)
        return joined.view(len(rows), 3, heads, -1).unbind(1)
    inputs = zip(names, (query_rows, rows, rows), strict=True)
    return [getattr(projections, name)(x).view(len(x), heads, -1) for name, x in inputs]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: _Layout,
    *,
    single: bool,
    dropout: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention within each pair: (rows, heads, size) from inputs of that shape; `single`: one query per pair.

    `bias` (heads or 1, longest, longest) is added to the scores, or says which tokens a token attends to if it is
    boolean. It depends on the distance of two tokens only, so a shorter pair uses a part of it.
    """
    if query.is_cuda and query.dtype is torch.bfloat16 and not dropout and bias is None:
        from torch.nn.attention.varlen import varlen_attn

        longest = max(layout.lengths)
        query_ends = (
            torch.arange(len(layout.lengths) + 1, dtype=torch.int32, device=query.device) if single else layout.ends
        )
        # varlen_attn returns a tuple only with `return_aux`.
        return cast(Tensor, varlen_attn(query, key, value, query_ends, layout.ends, 1 if single else longest, longest))
    if bias is not None and bias.is_floating_point():
        bias = bias.to(query.dtype)
    shape, attended, row, query_row = query.shape[1:], [], 0, 0
    for pairs, length in layout.segments:
        rows, queries = pairs * length, pairs if single else pairs * length
        q = query[query_row : query_row + queries].view(pairs, -1, *shape).transpose(1, 2)
        k, v = (tensor[row : row + rows].view(pairs, length, *shape).transpose(1, 2) for tensor in (key, value))
        mask = None if bias is None else bias[None, :, : q.shape[2], :length]
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        attended.append(mixed.transpose(1, 2).flatten(0, 1))
        row, query_row = row + rows, query_row + queries
    return torch.cat(attended) if len(attended) > 1 else attended[0]


def _modernbert_logits(model: "PreTrainedModel", batch: Sequence[EncodedPair], layout: _Layout) -> Tensor:
    """Logits (pairs,) of ModernBERT, whose head reads the first token or the mean of the tokens."""
    config, body = model.config, model.base_model
    hidden: Tensor = body.embeddings(input_ids=_token_ids(batch, layout)[None])[0]
    positions = layout.positions[None]
    rotations = {name: body.rotary_emb(hidden, positions, name) for name in set(config.layer_types)}
    masks = {"sliding_attention": _window(layout, config.sliding_window)}
    reads_mean = config.classifier_pooling == "mean"
    layers: Sequence[_GatedLayer] = body.layers
    for layer in layers:
        rotation, mask = rotations[layer.attention_type], masks.get(layer.attention_type)
        last = layer is layers[-1] and not reads_mean
        hidden = _run_gated_layer(layer, hidden, layout, rotation=rotation, mask=mask, last=last)
    hidden = body.final_norm(hidden).float()
    if reads_mean:
        lengths = layout.ends.diff()
        pair = torch.arange(len(lengths), device=hidden.device).repeat_interleave(lengths)
        hidden = hidden.new_zeros(len(lengths), hidden.shape[1]).index_add(0, pair, hidden) / lengths[:, None]
    logits: Tensor = model.classifier(model.drop(model.head(hidden))).squeeze(-1)
    return logits


def _window(layout: _Layout, distance: int) -> Tensor | None:
    """(1, longest, longest): whether two tokens are at most `distance` apart; None if all tokens of a pair are."""
    longest = layout.lengths[0]
    if longest <= distance + 1:
        return None
    positions = torch.arange(longest, device=layout.starts.device)
    return ((positions[:, None] - positions).abs() <= distance)[None]


def _run_gated_layer(
    layer: _GatedLayer,
    hidden: Tensor,
    layout: _Layout,
    *,
    rotation: tuple[Tensor, Tensor],
    mask: Tensor | None,
    last: bool,
) -> Tensor:
    """The output of a layer of ModernBERT: (tokens, hidden), or (pairs, hidden) for the last layer."""
    from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

    attention = layer.attn
    dtype = attention.Wqkv.weight.dtype
    joined: Tensor = attention.Wqkv(layer.attn_norm(hidden).to(dtype))
    query, key, value = joined.view(len(hidden), 3, -1, attention.head_dim).unbind(1)
    query, key = (part[0] for part in apply_rotary_pos_emb(query[None], key[None], *rotation, unsqueeze_dim=2))
    if last:
        query, hidden = query[layout.starts], hidden[layout.starts]
    dropout = attention.attention_dropout if layer.training else 0.0
    mixed = _attend(query, key, value, layout, single=last, dropout=dropout, bias=mask)
    hidden = hidden + attention.out_drop(attention.Wo(mixed.flatten(1)))
    return hidden + layer.mlp(layer.mlp_norm(hidden).to(dtype))


def convert_matrices_to_bf16(model: "PreTrainedModel") -> None:
    """Converts an encoder's linear layers to bf16; norms, embeddings and residuals stay in fp32."""
    body = model.base_model
    layers = body.layers if model.config.model_type == "modernbert" else body.encoder.layer
    if next(model.parameters()).device.type == "cpu" and has_prepacking():
        if model.config.model_type != "modernbert":
            names = _PROJECTIONS.get(model.config.model_type, ("query", "key", "value"))
            _join_layers(layers, names, gelu=model.config.hidden_act == "gelu")
        _prepack(layers)
        return
    for module in layers.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)


def _prepack(layers: nn.ModuleList) -> None:
    """Replaces every linear layer with a `PrepackedLinear`."""
    for module in list(layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PrepackedLinear(child))


def _join_layers(layers: Sequence[_Layer], names: Sequence[str], *, gelu: bool) -> None:
    """Makes one linear layer of those for queries, keys and values, `qkv`, and of an exact GELU and the one before it.

    The last layer keeps its own for queries, because it needs only the first query of each pair.
    """
    for layer in layers:
        projections, _ = _split_attention(layer.attention)
        if layer is not layers[-1]:
            projections.qkv = _concatenate(*(getattr(projections, name) for name in names))
            for name in names:
                setattr(projections, name, None)
        if gelu:
            layer.add_module("intermediate", PrepackedLinear(layer.intermediate.dense, "gelu"))


def _concatenate(*layers: nn.Linear) -> nn.Linear:
    """One linear layer whose output is the concatenation of the outputs of these."""
    joined = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers))
    joined.weight.data = torch.cat([layer.weight.detach() for layer in layers])
    joined.bias.data = torch.cat([layer.bias.detach() for layer in layers])
    return joined
