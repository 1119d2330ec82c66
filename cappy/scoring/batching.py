"""Batches: pairs of similar length within a budget of tokens, and the padded inputs that transformers reads."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cappy.scoring.encoding import Encoded


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


def padding_token(config: Any) -> int | None:
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
