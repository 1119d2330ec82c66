"""Batches: pairs of similar length within a budget of tokens, padded for transformers or packed end to end.

Encoders of BERT's build run over the tokens alone (`packed_logits`), and nothing is multiplied for padding. The modules
are those of transformers, called one by one, so weights and numbers are the same as in its own forward. Two things
differ. Attention runs over stretches of pairs of equal length, without a mask (on a GPU in bf16: one kernel for any
lengths). And the last layer works for the first token of each pair, which is all that the head reads.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cappy.scoring.encoding import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def by_length(encoded: Sequence[Encoded], budget: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, padded tokens within `budget` (or a single pair)."""
    batch: list[int] = []
    for index in sorted(range(len(encoded)), key=lambda i: -len(encoded[i].ids)):
        if batch and (len(batch) + 1) * len(encoded[batch[0]].ids) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def padding_token(config: "PreTrainedConfig") -> int | None:
    """What pads pairs of different lengths: the model's own padding, by which it finds its last token or positions.

    None where it has none, or one that is no token, or where its head reads the last place, padding or not (XLNet): its
    pairs are computed one at a time.
    """
    text = config.get_text_config()
    pad = None if getattr(text, "summary_type", "") == "last" else getattr(text, "pad_token_id", None)
    return pad if isinstance(pad, int) and 0 <= pad < text.vocab_size else None


def collate(batch: Sequence[Encoded], *, pad: int, types: bool, device: torch.device) -> dict[str, Tensor]:
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
"""Families whose positions count the tokens that are no padding, from the padding's own number on."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where pairs lie: the row of each one's first token, and (pairs, tokens of each) for stretches of equal length."""

    lengths: tuple[int, ...]
    starts: Tensor
    stretches: tuple[tuple[int, int], ...]
    ends: Tensor
    """(pairs + 1,) int32: 0 and the row after each pair."""


def packs(model: "PreTrainedModel") -> bool:
    """Whether this module knows the model's build."""
    config = model.config
    return config.model_type in FAMILIES and not config.is_decoder and hasattr(model, "classifier")


def packed_logits(model: "PreTrainedModel", batch: Sequence[Encoded], device: torch.device) -> Tensor:
    """Logits (pairs,) in fp32; linear maps run in the precision of their weights, dropout where the model trains."""
    order = sorted(range(len(batch)), key=lambda number: -len(batch[number].ids))
    batch = [batch[number] for number in order]
    body, layout = model.base_model, _layout(batch, device)
    hidden = _embedded(body, model.config, batch, layout)
    layers = body.encoder.layer
    for layer in layers:
        hidden = _layer(layer, hidden, layout, last=layer is layers[-1])
    first = hidden.float()[:, None]
    logits: Tensor = model.classifier(first if body.pooler is None else model.dropout(body.pooler(first))).squeeze(-1)
    return logits[torch.tensor(order, device=device).argsort()]


def _layout(batch: Sequence[Encoded], device: torch.device) -> _Layout:
    lengths = tuple(len(pair.ids) for pair in batch)
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    stretches = tuple((len(list(equal)), length) for length, equal in groupby(lengths))
    return _Layout(lengths=lengths, starts=ends[:-1].long(), stretches=stretches, ends=ends)


def _embedded(body: Any, config: "PreTrainedConfig", batch: Sequence[Encoded], layout: _Layout) -> Tensor:
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
    embedded: Tensor = body.embeddings(input_ids=ids[None], token_type_ids=types[None], position_ids=positions[None])[0]
    return embedded


def _layer(layer: Any, hidden: Tensor, layout: _Layout, *, last: bool) -> Tensor:
    """(tokens, hidden), or (pairs, hidden) of the last layer."""
    projections = layer.attention.self
    dtype = layer.attention.output.dense.weight.dtype
    narrow = hidden.to(dtype)
    asking, kept = (narrow[layout.starts], hidden[layout.starts]) if last else (narrow, hidden)
    query, key, value = _projected(projections, asking, narrow)
    dropout = projections.dropout.p if layer.training else 0.0
    mixed = _attention(query, key, value, layout, single=last, dropout=dropout)
    attended = layer.attention.output(mixed.flatten(1), kept)
    output: Tensor = layer.output(layer.intermediate(attended.to(dtype)), attended)
    return output


def _projected(projections: Any, asking: Tensor, narrow: Tensor) -> Sequence[Tensor]:
    """Queries of the rows `asking`, keys and values of all, (rows, heads, size) each."""
    heads = projections.num_attention_heads
    if hasattr(projections, "together"):
        joined: Tensor = projections.together(narrow)
        return joined.view(len(narrow), 3, heads, -1).unbind(1)
    maps = ((projections.query, asking), (projections.key, narrow), (projections.value, narrow))
    return [project(rows).view(len(rows), heads, -1) for project, rows in maps]


def _attention(query: Tensor, key: Tensor, value: Tensor, layout: _Layout, *, single: bool, dropout: float) -> Tensor:
    """(rows, heads, size) from queries, keys and values of that shape; `single`: one query per pair."""
    if query.is_cuda and query.dtype is torch.bfloat16 and not dropout:
        from torch.nn.attention.varlen import varlen_attn

        longest = max(layout.lengths)
        asked = torch.arange(len(layout.lengths) + 1, dtype=torch.int32, device=query.device) if single else layout.ends
        flash: Any = varlen_attn(query, key, value, asked, layout.ends, 1 if single else longest, longest)
        return cast(Tensor, flash)
    shape, attended, row, asked_row = query.shape[1:], [], 0, 0
    for pairs, length in layout.stretches:
        rows, queries = pairs * length, pairs if single else pairs * length
        q = query[asked_row : asked_row + queries].view(pairs, -1, *shape).transpose(1, 2)
        k, v = (whole[row : row + rows].view(pairs, length, *shape).transpose(1, 2) for whole in (key, value))
        attended.append(scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(0, 1))
        row, asked_row = row + rows, asked_row + queries
    return torch.cat(attended) if len(attended) > 1 else attended[0]
