"""Throughput and cost of training, the progress line that shows them, and the curve files of a run.

Importing this module does not import torch.
"""

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
"""Dense bf16 FLOP/s by a part of the device's name, from NVIDIA's data sheets; the first match counts."""
TRAINING_EFFICIENCY = 0.33
"""Share of the rate of plain products of matrices that training reaches, checks and tokenization included.

Cross-fitting the built-in scorer on 440 instances of 8 responses was estimated at 6 min 13 s with a share of 0.5 and
took about 9 min (2 cores, 2026-11-30).
"""
MEASURED_SECONDS = 0.3
WINDOW = 20
"""Updates over which the current figures are averaged."""
TRAINING_LOG = "training.json"
_LOSS_COLUMNS = ("update", "loss", "rate")
"""The reproducible columns of a point; the others measure speed."""

Point = Mapping[str, float]
"""A point of a run's curves, by column name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cost:
    """The cost of an update: pairs, their tokens without and with padding, FLOPs, seconds."""

    pairs: int
    tokens: int
    padded_tokens: int
    flops: float
    seconds: float


class Meter:
    """Measures throughput over the batches of the last `WINDOW` updates; checks and checkpoints are not timed.

    `peak` is the peak FLOP/s of all ranks together, None if unknown.
    """

    def __init__(self, peak: float | None = None) -> None:
        self._peak = peak
        self._recent: deque[_Cost] = deque(maxlen=WINDOW)
        self._seconds = 0.0

    @contextmanager
    def time_update(self) -> Iterator[None]:
        """Times the update that runs in the `with` block."""
        started = time.perf_counter()
        yield
        self._seconds = time.perf_counter() - started

    def add(self, *, pairs: int, tokens: int, padded_tokens: int, flops: float) -> None:
        """Records the work of the last timed update."""
        seconds = self._seconds
        self._recent.append(
            _Cost(pairs=pairs, tokens=tokens, padded_tokens=padded_tokens, flops=flops, seconds=seconds)
        )

    def reset(self) -> None:
        """Discards the updates so far."""
        self._recent.clear()

    def figures(self) -> dict[str, float]:
        """Pairs and tokens per second, the share of padding (0 to 1), and MFU (0 to 1) if the peak is known."""
        seconds = sum(cost.seconds for cost in self._recent)
        if seconds <= 0:
            return {}
        tokens = sum(cost.tokens for cost in self._recent)
        figures = {
            "pairs_per_second": sum(cost.pairs for cost in self._recent) / seconds,
            "tokens_per_second": tokens / seconds,
            "padding_share": 1 - tokens / max(1, sum(cost.padded_tokens for cost in self._recent)),
        }
        flops = sum(cost.flops for cost in self._recent)
        if self._peak and flops:
            figures["mfu"] = flops / seconds / self._peak
        return {name: float(f"{value:.4g}") for name, value in figures.items()}


def peak_flops(device: "torch.device", num_ranks: int, *, bf16: bool) -> float | None:
    """The peak bf16 FLOP/s of `num_ranks` devices of this kind; None for a CPU, an unknown GPU or another precision."""
    if device.type != "cuda" or not bf16:
        return None
    import torch

    name = torch.cuda.get_device_name(device)
    return next(
        (num_ranks * peak for name_part, peak in PEAK_FLOPS.items() if re.search(rf"\b{name_part}\b", name)), None
    )


def pair_flops(config: "PretrainedConfig", num_layer_weights: int, tokens: int) -> float:
    """FLOPs of a pair of `tokens` tokens, forward and backward, without padding.

    `num_layer_weights` is the number of weights in the layers' matrices (`count_layer_weights`).

    6 per layer weight and token (Kaplan et al. 2020, section 2.1), plus 12 x layers x width x tokens² for attention
    (PaLM, Chowdhery et al. 2022, appendix B).
    """
    flops: float = 6.0 * num_layer_weights * tokens + 12.0 * config.num_hidden_layers * config.hidden_size * tokens**2
    return flops


def count_layer_weights(model: "PreTrainedModel") -> int:
    """The number of weights in the matrices of the encoder's layers, without embeddings and head; 0 if unknown.

    Returns 0 for ALBERT, because it applies one layer several times.
    """
    base = model.base_model
    names = [name for name in ("encoder", "transformer", "layers") if hasattr(base, name)]
    if not names or model.config.model_type == "albert":
        return 0
    layers = getattr(base, names[0])
    count: int = sum(weight.numel() for weight in layers.parameters() if weight.ndim == 2)
    return count


def estimate_seconds(folder: Path, pairs: float, tokens: float) -> float:
    """Estimated seconds to train the scorer or encoder in a folder on pairs of about `tokens` tokens on this machine.

    The operations of `pair_flops` at the rate at which this machine multiplies matrices of the encoder's size, measured
    for a moment, times `TRAINING_EFFICIENCY`. Raises FolderError if the folder is not valid.
    """
    from cappy.model_folder import open_model_folder, read_tensor_sizes

    config = open_model_folder(folder).config()
    embeddings = getattr(config, "vocab_size", 0) * getattr(config, "hidden_size", 0)
    layer_weights = sum(read_tensor_sizes(folder)) - embeddings
    flops = pairs * pair_flops(config, max(1, layer_weights), round(tokens))
    return flops / (TRAINING_EFFICIENCY * _measure_flops(config.hidden_size))


def _measure_flops(width: int) -> float:
    """FLOP/s of products of matrices in fp32 that a layer of this width needs, on the device that would train."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs, weights = torch.rand(1024, width, device=device), torch.rand(width, 4 * width, device=device)
    products, started = 0, time.perf_counter()
    while (seconds := time.perf_counter() - started) < MEASURED_SECONDS:
        # Reading a value waits for the product on a GPU.
        float((inputs @ weights)[0, 0])
        products += 1
    return products * 2 * inputs.shape[0] * weights.numel() / seconds


def describe_progress(loss: float, rate: float, figures: Mapping[str, float]) -> str:
    """The current figures as text for the progress line."""
    parts = [f"loss {loss:.4f}", f"rate {rate:.2g}"]
    if figures:
        parts.append(f"{figures['pairs_per_second']:,.3g} pairs/s")
        parts.append(f"{figures['tokens_per_second']:,.0f} tokens/s")
        parts.append(f"{figures['padding_share']:.0%} padding")
    if "mfu" in figures:
        parts.append(f"MFU {figures['mfu']:.0%}")
    return ", ".join(parts)


def describe_trial(metrics: Mapping[str, float]) -> str:
    """The result of a dry run as a sentence."""
    mfu = f", MFU {metrics['mfu']:.0%}" if "mfu" in metrics else ""
    total_time = duration(metrics["projected_seconds"])
    return (
        f"{metrics['trial_updates']:.0f} updates of {metrics['updates']:,.0f}: "
        f"{metrics['seconds_per_update']:.3g} s each, {metrics['pairs_per_second']:,.3g} pairs/s, "
        f"{metrics['tokens_per_second']:,.0f} tokens/s, {metrics['padding_share']:.0%} padding{mfu}, "
        f"peak memory {metrics['peak_bytes'] / 2**20:,.0f} MiB at {metrics['batch_tokens']:,.0f} tokens per pass; "
        f"the whole run takes about {total_time} with its checks, unless it stops early. No scorer was written."
    )


def write_log(folder: Path, checks: Sequence[Point], curve: Sequence[Point], events: Sequence[str]) -> None:
    """Writes checks, curve and events to `TRAINING_LOG` in the scorer's folder.

    A check has the loss and the mean label of the picks, a point of the curve the loss and the learning rate. Speed is
    left out, so that the same run writes the same file.
    """
    loss_points = [{name: point[name] for name in _LOSS_COLUMNS} for point in curve]
    log = {"checks": list(checks), "curve": loss_points, "events": list(events)}
    (folder / TRAINING_LOG).write_text(json.dumps(log, indent=1) + "\n")


def write_speed(work: Path, manifest_hash: str, curve: Sequence[Point]) -> None:
    """Writes the speed columns of the curve under `work`, named by the hash of the scorer's manifest."""
    points = [{name: value for name, value in point.items() if name not in _LOSS_COLUMNS[1:]} for point in curve]
    path = _speed_path(work, manifest_hash)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(points) + "\n")


def read_curves(folder: Path, work: Path, manifest_hash: str) -> list[dict[str, float]]:
    """All points of a run's curves, with speed if its file is still in `work`; empty for a folder without a log."""
    if not (folder / TRAINING_LOG).is_file():
        return []
    log = json.loads((folder / TRAINING_LOG).read_text())
    speed = _speed_path(work, manifest_hash)
    columns = ("update", "pick", "expected")
    pick_labels = [
        {name: check[name] for name in columns if name in check} for check in log["checks"] if "pick" in check
    ]
    return [*log["curve"], *pick_labels, *(json.loads(speed.read_text()) if speed.is_file() else ())]


def _speed_path(work: Path, manifest_hash: str) -> Path:
    return work / "speed" / f"{manifest_hash}.json"
