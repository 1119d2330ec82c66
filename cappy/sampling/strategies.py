"""Decoding strategies by name; each states every knob, so that nothing of a model's own configuration leaks in."""

from collections.abc import Mapping
from dataclasses import dataclass

from cappy.errors import ConfigError, shown

MAX_NEW_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How one generator draws `num_samples` responses for an instruction.

    `top_k` 0 and `top_p` 1 switch their filters off; without `do_sample` the response is the best of `num_beams`
    beams (greedy for one beam).
    """

    name: str
    num_samples: int = 1
    do_sample: bool = True
    num_beams: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = MAX_NEW_TOKENS


GREEDY = Decoding(name="greedy", do_sample=False)
BEAM4 = Decoding(name="beam4", do_sample=False, num_beams=4)

STRATEGIES: Mapping[str, tuple[Decoding, ...]] = {
    "greedy": (GREEDY,),
    "sampling8": (Decoding(name="sampling", num_samples=8),),
    "paper17": (
        BEAM4,
        Decoding(name="sampling", num_samples=4),
        Decoding(name="temperature0.9", num_samples=4, temperature=0.9),
        Decoding(name="topk40", num_samples=4, top_k=40),
        Decoding(name="topp0.95", num_samples=4, top_p=0.95),
    ),
    "endpoint8": (
        Decoding(name="temperature0", do_sample=False),
        Decoding(name="sampling", num_samples=4),
        Decoding(name="topp0.95", num_samples=3, top_p=0.95),
    ),
}
"""`paper17` is the 17-candidate scheme of Cappy (reference code, generation script) with its top-k 50 leak mended."""


def strategy(name: str) -> tuple[Decoding, ...]:
    """The decodings of a strategy; ConfigError lists the names there are."""
    if name not in STRATEGIES:
        raise ConfigError(f"sampling: --strategy: {shown(name)} is unknown; choose one of {', '.join(STRATEGIES)}")
    return STRATEGIES[name]
