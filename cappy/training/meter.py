"""What training costs while it runs, the line that says so, and the curves that a run leaves. Importing it is light."""

import json
import re
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cappy.progress import duration

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

PEAK_FLOPS: Mapping[str, float] = {
    "B200": 2.25e15,
    "H200": 9.89e14,
    "H100 PCIe": 7.56e14,
    "H100 NVL": 8.35e14,
    "H100": 9.89e14,
    "A100": 3.12e14,
    "L40S": 3.62e14,
    "L40": 1.81e14,
    "A10G": 7.0e13,
    "L4": 1.21e14,
}
"""Dense bf16 FLOP/s by a part of the device's name, from NVIDIA's data sheets; the first that fits counts."""
WINDOW = 20
"""Updates that the figures of now are means over."""
TRAINING_LOG = "training.json"
_LOSS_COLUMNS = ("update", "loss", "rate")
"""What a point tells that a second run would tell again; the rest is speed."""

Point = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cost:
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
        self._recent: deque[_Cost] = deque(maxlen=WINDOW)
        self._seconds = 0.0

    @contextmanager
    def time_update(self) -> Iterator[None]:
        """Times the update that its block makes."""
        started = time.perf_counter()
        yield
        self._seconds = time.perf_counter() - started

    def add(self, *, pairs: int, tokens: int, padded: int, flops: float) -> None:
        """Notes what the update just timed has done."""
        self._recent.append(_Cost(pairs=pairs, tokens=tokens, padded=padded, flops=flops, seconds=self._seconds))

    def reset(self) -> None:
        """Drops the updates so far."""
        self._recent.clear()

    def figures(self) -> dict[str, float]:
        """The figures of now: pairs and tokens per second, share of padding, and MFU where the peak is known."""
        seconds = sum(cost.seconds for cost in self._recent)
        if seconds <= 0:
            return {}
        tokens = sum(cost.tokens for cost in self._recent)
        figures = {
            "pairs_per_second": sum(cost.pairs for cost in self._recent) / seconds,
            "tokens_per_second": tokens / seconds,
            "padding_share": 1 - tokens / max(1, sum(cost.padded for cost in self._recent)),
        }
        flops = sum(cost.flops for cost in self._recent)
        if self._peak and flops:
            figures["mfu"] = flops / seconds / self._peak
        return {name: float(f"{value:.4g}") for name, value in figures.items()}


def peak_flops(device: "torch.device", ranks: int, *, bf16: bool) -> float | None:
    """FLOP/s that `ranks` such devices reach at best in bf16; None of a CPU, an unknown GPU and another precision."""
    if device.type != "cuda" or not bf16:
        return None
    import torch

    name = torch.cuda.get_device_name(device)
    return next((ranks * peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)


def pair_flops(config: "PretrainedConfig", weights: int, tokens: int) -> float:
    """FLOPs of a pair, forward and backward: 6 per weight of the layers and token, and attention's two products.

    Kaplan et al. 2020 (2.1) count so for the weights; attention is 12 x layers x width x tokens², as PaLM (appendix B)
    counts it. Padding does no work here.
    """
    flops: float = 6.0 * weights * tokens + 12.0 * config.num_hidden_layers * config.hidden_size * tokens**2
    return flops


def count_layer_weights(model: "PreTrainedModel") -> int:
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


def describe_progress(loss: float, rate: float, figures: Mapping[str, float]) -> str:
    """The figures of now as one line shows them."""
    parts = [f"loss {loss:.4f}", f"rate {rate:.2g}"]
    if figures:
        parts.append(f"{figures['pairs_per_second']:,.3g} pairs/s")
        parts.append(f"{figures['tokens_per_second']:,.0f} tokens/s")
        parts.append(f"{figures['padding_share']:.0%} padding")
    if "mfu" in figures:
        parts.append(f"MFU {figures['mfu']:.0%}")
    return ", ".join(parts)


def describe_trial(metrics: Mapping[str, float]) -> str:
    """A trial's figures as a person reads them."""
    mfu = f", MFU {metrics['mfu']:.0%}" if "mfu" in metrics else ""
    whole = duration(metrics["projected_seconds"])
    return (
        f"{metrics['trial_updates']:.0f} updates of {metrics['updates']:,.0f}: "
        f"{metrics['seconds_per_update']:.3g} s each, {metrics['pairs_per_second']:,.3g} pairs/s, "
        f"{metrics['tokens_per_second']:,.0f} tokens/s, {metrics['padding_share']:.0%} padding{mfu}, "
        f"peak memory {metrics['peak_bytes'] / 2**20:,.0f} MiB at {metrics['batch_tokens']:,.0f} tokens per pass; "
        f"the whole run takes about {whole} with its checks, unless it stops early. No scorer was written."
    )


def write_log(folder: Path, checks: Sequence[Point], curve: Sequence[Point], events: Sequence[str]) -> None:
    """Writes checks (loss and pick), curve (loss and rate) and events into the scorer's folder.

    Speed stays out of it: the same run twice is the same scorer.
    """
    learned = [{name: point[name] for name in _LOSS_COLUMNS} for point in curve]
    log = {"checks": list(checks), "curve": learned, "events": list(events)}
    (folder / TRAINING_LOG).write_text(json.dumps(log, indent=1) + "\n")


def write_speed(work: Path, manifest_hash: str, curve: Sequence[Point]) -> None:
    """Writes what the updates cost under `work`, by the hash of the scorer's manifest."""
    points = [{name: value for name, value in point.items() if name not in _LOSS_COLUMNS[1:]} for point in curve]
    path = _speed_path(work, manifest_hash)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(points) + "\n")


def read_curves(folder: Path, work: Path, manifest_hash: str) -> list[dict[str, float]]:
    """Every point of a run's curves, speed among them where `work` still has it; none of a folder without a log."""
    if not (folder / TRAINING_LOG).is_file():
        return []
    log = json.loads((folder / TRAINING_LOG).read_text())
    speed = _speed_path(work, manifest_hash)
    shown = ("update", "pick", "expected")
    picks = [{name: check[name] for name in shown if name in check} for check in log["checks"] if "pick" in check]
    return [*log["curve"], *picks, *(json.loads(speed.read_text()) if speed.is_file() else ())]


def _speed_path(work: Path, manifest_hash: str) -> Path:
    return work / "speed" / f"{manifest_hash}.json"
