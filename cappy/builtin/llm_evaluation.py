"""How good the built-in LLM is on each family, and how much there is to win by selecting."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from transformers import PreTrainedTokenizerFast, T5ForConditionalGeneration

from cappy.annotation import rouge_l
from cappy.records.instance import Instance

_BATCH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Mean Rouge-L, 0 to 1: of the greedy response, of a sample at temperature 1, of the best of `num_samples`."""

    greedy: float
    sample: float
    oracle: float
    num_samples: int


def evaluate(
    model: T5ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    instances: Iterable[Instance],
    *,
    num_samples: int = 8,
) -> dict[str, Quality]:
    """The quality on each family, from torch's random state."""
    rows = sorted(instances, key=lambda row: len(row.instruction))
    greedy: dict[str, list[float]] = defaultdict(list)
    sampled: dict[str, list[list[float]]] = defaultdict(list)
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        best = respond(model, tokenizer, [row.instruction for row in batch])
        drawn = respond(model, tokenizer, [row.instruction for row in batch], num_samples=num_samples)
        for index, row in enumerate(batch):
            responses = drawn[index * num_samples : (index + 1) * num_samples]
            greedy[row.task].append(rouge_l(row.references, best[index]))
            sampled[row.task].append([rouge_l(row.references, response) for response in responses])
    return {
        family: Quality(
            greedy=round(fmean(greedy[family]), 4),
            sample=round(fmean(map(fmean, sampled[family])), 4),
            oracle=round(fmean(map(max, sampled[family])), 4),
            num_samples=num_samples,
        )
        for family in sorted(greedy)
    }


@torch.inference_mode()
def respond(
    model: T5ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    instructions: Sequence[str],
    *,
    num_samples: int = 0,
) -> list[str]:
    """One greedy response to each instruction, or `num_samples` at temperature 1, those of an instruction together."""
    encoded = tokenizer(list(instructions), padding=True, return_tensors="pt", return_token_type_ids=False)
    if num_samples:
        ids = model.generate(**encoded, do_sample=True, top_k=0, num_return_sequences=num_samples)
    else:
        ids = model.generate(**encoded, do_sample=False)
    return list(tokenizer.batch_decode(ids, skip_special_tokens=True))
