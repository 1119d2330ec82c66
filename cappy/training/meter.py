"""What training costs while it runs: pairs and tokens per second, padding, the share of the device's peak."""

import re
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from cappy.training.peaks import PEAKS

RECENT = 20
"""Updates that the figures of now are means over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of an update: pairs, their tokens, the tokens that were multiplied (padding included), FLOPs, seconds."""

    pairs: int
    tokens: int
    padded: int
    flops: float
    seconds: float


class Meter:
    """Counts the whole batch of every update against the time that updates took; checks and checkpoints are left out.

    `peak` is the FLOP/s of all ranks together, where known.
    """

    def __init__(self, peak: float | None = None) -> None:
        self._peak = peak
        self._recent: deque[Cost] = deque(maxlen=RECENT)
        self._seconds = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Times the update that its block makes."""
        started = time.perf_counter()
        yield
        self._seconds = time.perf_counter() - started

    def add(self, *, pairs: int, tokens: int, padded: int, flops: float) -> None:
        """Notes what the update just timed has done."""
        self._recent.append(Cost(pairs=pairs, tokens=tokens, padded=padded, flops=flops, seconds=self._seconds))

    def forget(self) -> None:
        """Drops the updates so far."""
        self._recent.clear()

    def figures(self) -> dict[str, float]:
        """The figures of now: pairs and tokens per second, share of padding, and MFU where the peak is known."""
        seconds = sum(cost.seconds for cost in self._recent)
        if seconds <= 0:
            return {}
        tokens = sum(cost.tokens for cost in self._recent)
        found = {
            "pairs_per_second": sum(cost.pairs for cost in self._recent) / seconds,
            "tokens_per_second": tokens / seconds,
            "padding_share": 1 - tokens / max(1, sum(cost.padded for cost in self._recent)),
        }
        flops = sum(cost.flops for cost in self._recent)
        if self._peak and flops:
            found["mfu"] = flops / seconds / self._peak
        return {name: float(f"{value:.4g}") for name, value in found.items()}


def peak_of(device: torch.device, ranks: int, *, bf16: bool) -> float | None:
    """FLOP/s that `ranks` such devices reach at best in bf16; None of a CPU, an unknown GPU and another precision."""
    if device.type != "cuda" or not bf16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((ranks * peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)


def flops_of_pair(config: Any, weights: int, tokens: int) -> float:
    """FLOPs of a pair, forward and backward: 6 per weight of the layers and token, and attention's two products.

    Kaplan et al. 2020 (2.1) count so for the weights; attention is 12 x layers x width x tokens², as PaLM (appendix B)
    counts it. Padding does no work here.
    """
    flops: float = 6.0 * weights * tokens + 12.0 * config.num_hidden_layers * config.hidden_size * tokens**2
    return flops


def layer_weights(model: Any) -> int:
    """Weights of the matrices in the encoder's layers: neither embeddings nor the head; 0 of an unknown build.

    ALBERT passes one layer many times: it counts as unknown.
    """
    body = model.base_model
    names = [name for name in ("encoder", "transformer", "layers") if hasattr(body, name)]
    if not names or model.config.model_type == "albert":
        return 0
    layers = getattr(body, names[0])
    count: int = sum(weight.numel() for weight in layers.parameters() if weight.ndim == 2)
    return count


def told(loss: float, rate: float, figures: Mapping[str, float]) -> str:
    """The figures of now as one line shows them."""
    parts = [f"loss {loss:.4f}", f"rate {rate:.2g}"]
    if figures:
        parts.append(f"{figures['pairs_per_second']:,.3g} pairs/s")
        parts.append(f"{figures['tokens_per_second']:,.0f} tokens/s")
        parts.append(f"{figures['padding_share']:.0%} padding")
    if "mfu" in figures:
        parts.append(f"MFU {figures['mfu']:.0%}")
    return ", ".join(parts)
