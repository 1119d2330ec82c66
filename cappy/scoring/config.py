"""What a scorer is beside its weights and its tokenizer; imports nothing heavy."""

from dataclasses import dataclass
from typing import Literal, get_args

Head = Literal["mse", "bce"]
HEADS: tuple[Head, ...] = get_args(Head)
Truncation = Literal["middle", "longest_first"]
"""Where a pair that is too long is cut: inside the instruction, or at the end of the longer text, as published."""
TRUNCATIONS: tuple[Truncation, ...] = get_args(Truncation)
Precision = Literal["auto", "fp32", "bf16"]
"""What the body of a scorer runs in: `auto` is bf16 where the device has instructions for it, else fp32."""
ChosenPrecision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorerConfig:
    """What a folder records that transformers does not ask for.

    The head `bce` gives 0 to 1 (a sigmoid over soft labels); `mse` is the published raw regression, which is never
    clipped. `max_length` is the number of tokens of a pair.
    """

    head: Head
    max_length: int
    truncation: Truncation = "middle"
