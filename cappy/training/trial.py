"""A trial of a training run: a few real updates, and from them the time and memory of the whole."""

import resource
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from cappy.progress import Progress, duration
from cappy.scoring.scorer import Scorer
from cappy.training.checks import CANDIDATES
from cappy.training.corpus import Corpus
from cappy.training.guards import refuse_unfit
from cappy.training.loop import Run
from cappy.training.plan import TrainingSettings
from cappy.training.ranks import Ranks

UPDATES = 20
WARM = 2
"""First updates, which also load and allocate: they are not timed."""
FORWARD = 1 / 3
"""Cost of scoring a pair, as a share of training on it: the backward pass is twice the forward one."""


def trial(
    scorer: Scorer, train: Corpus, validation: Corpus, plan: TrainingSettings, ranks: Ranks, progress: Progress
) -> dict[str, float]:
    """Trains `UPDATES` updates and forgets them; seconds and bytes, this rank's alone.

    `projected_seconds` are of the whole run on these ranks: every epoch, and the checks, a pair of which is taken to
    cost a third of a pair trained on. Early stopping would make it shorter.
    """
    refuse_unfit(train, plan, ranks)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(scorer, train, validation, plan, Path(folder), ranks)
        count = min(UPDATES, run.updates)
        ends = [time.perf_counter()]
        for done in range(1, count + 1):
            if done == WARM + 1:
                run.meter.forget()
            run.update()
            ends.append(time.perf_counter())
            progress(done, count, unit="updates of the trial", note=run.told)
    warm = min(WARM, count - 1)
    per_update = (ends[-1] - ends[warm]) / (count - warm)
    figures = run.meter.figures()
    checked = sum(min(CANDIDATES, len(validation.selectable(index))) for index in range(len(validation)))
    checks = len({*range(0, run.updates, run.every), run.updates})
    checking = FORWARD * checked / max(figures["pairs_per_second"], 1e-9) * checks
    return {
        "batch_tokens": float(run.state.budget),
        "trial_updates": float(count),
        "seconds_per_update": per_update,
        **figures,
        "peak_bytes": float(_peak_bytes(scorer.device)),
        "updates": float(run.updates),
        "projected_seconds": per_update * run.updates + checking,
    }


def text(metrics: Mapping[str, float]) -> str:
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


def _peak_bytes(device: torch.device) -> int:
    """Most memory so far: of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
