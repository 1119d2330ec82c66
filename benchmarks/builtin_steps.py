"""A pretraining on the built-in tasks by the CLI commands, each timed as a whole process."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cappy.builtin.tasks import instances
from cappy.costing import Throughput
from cappy.costing.volumes import Lengths, Volumes

COMMAND = (sys.executable, "-c", "from cappy.cli import main; main()")
STRATEGY, SAMPLES = "topk40x5+topp0.95x5", 10
LAYERS, HIDDEN, LENGTH = 12, 160, 256
"""The shape of the scorer `mini` of `cappy plan`."""
VALIDATION = 0.05
"""The share of the built-in pretraining pool that is held out."""
POOL: Final = "pretraining"


@dataclass(frozen=True, kw_only=True)
class StepRun:
    """The wall-clock and CPU seconds of a step, its manifest, and the size of its output."""

    seconds: float
    cpu_seconds: float
    manifest: Mapping[str, Any]
    bytes: int


def commands(work: Path, per_family: int) -> dict[str, list[str]]:
    """The command line of each step; folders are in `work`."""
    prepared, sampled, annotated, scorer, report = (
        str(work / name) for name in ("prepared", "sampled", "annotated", "scorer", "report")
    )
    return {
        "preparation": ["--pool", POOL, "--num-per-family", str(per_family), "--target", prepared],
        "sampling": ["--source", prepared, "--target", sampled, "--generator", "builtin", "--strategy", STRATEGY],
        "annotation": ["--source", sampled, "--target", annotated],
        "pretraining": [
            "--source", annotated, "--target", scorer, "--layers", str(LAYERS), "--hidden-size", str(HIDDEN),
            "--max-length", str(LENGTH), "--epochs", "1", "--max-candidates", "16", "--keep", "last",
        ],
        "evaluation": ["--source", annotated, "--scorer", scorer, "--target", report, "--split", "validation"],
    }  # fmt: skip


def run_steps(work: Path, per_family: int) -> dict[str, StepRun]:
    """Runs the steps one after the other on one thread; times include the start of the process."""
    runs = {}
    for step, flags in commands(work, per_family).items():
        started, before = time.perf_counter(), _children_cpu_seconds()
        process = subprocess.run(
            [*COMMAND, step, *flags, "--work", str(work / "work"), "--json"],
            env={**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True, text=True,
        )  # fmt: skip
        if process.returncode:
            raise SystemExit(f"{step}: {process.stderr}")
        seconds, processor = time.perf_counter() - started, _children_cpu_seconds() - before
        target = Path(flags[flags.index("--target") + 1])
        runs[step] = StepRun(
            seconds=seconds,
            cpu_seconds=processor,
            manifest=json.loads((target / "manifest.json").read_text()),
            bytes=size_of(target),
        )
        print(f"{step}: {seconds:.1f} s, {processor:.1f} s of CPU", flush=True)
    return runs


def _children_cpu_seconds() -> float:
    """CPU seconds of finished child processes."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def builtin_volumes(per_family: int, throughput: Throughput) -> Volumes:
    """The volumes of `run_steps`, computed without looking at the run.

    Numbers of choices come from the task families, lengths from the measured ones.
    """
    one_per_family = list(instances(POOL, num_per_family=1))
    closed = [len(item.choices) for item in one_per_family if item.choices]
    prompts, open_prompts = len(one_per_family) * per_family, (len(one_per_family) - len(closed)) * per_family
    choices, samples = sum(closed) * per_family, open_prompts * SAMPLES
    pairs = choices + samples + 2 * open_prompts
    texts = {item.kind: item for item in throughput.lengths_of("builtin")}
    open_ended, with_choices = texts["open-ended"], texts["choices"]
    pair = Lengths(
        tokens=((pairs - choices) * open_ended.pair_tokens + choices * with_choices.pair_tokens) / pairs,
        squared=((pairs - choices) * open_ended.pair_squared + choices * with_choices.pair_squared) / pairs,
    )
    return Volumes(
        prompts=prompts,
        open_prompts=open_prompts,
        pairs=pairs,
        selectable=choices + samples,
        samples={"builtin": SAMPLES},
        prompt=Lengths(tokens=open_ended.prompt_tokens, squared=open_ended.prompt_squared),
        response_tokens=open_ended.response_tokens,
        pair=pair,
        evaluated_pairs=round((choices + samples) * VALIDATION),
        evaluated_pair=pair,
        measured_share=1.0,
    )
