"""The configuration of a scorer; imports nothing heavy."""

from dataclasses import dataclass
from typing import Literal, get_args

Head = Literal["mse", "bce"]
HEADS: tuple[Head, ...] = get_args(Head)
Truncation = Literal["middle", "longest_first"]
"""How a too long pair is truncated: in the middle of the instruction or, as published, the longer text at its end."""
TRUNCATIONS: tuple[Truncation, ...] = get_args(Truncation)
Precision = Literal["auto", "fp32", "bf16"]
"""The precision of a scorer's body: `auto` is bf16 if the device has instructions for it, else fp32."""
ChosenPrecision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorerConfig:
    """The settings of a scorer that a folder records besides those of transformers.

    The head `bce` gives scores from 0 to 1 (a sigmoid over soft labels); `mse` is the published raw regression, which
    is never clipped. `max_length` is the maximum number of tokens of a pair.
    """

    head: Head
    max_length: int
    truncation: Truncation = "middle"
