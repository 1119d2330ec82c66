"""A pretraining on the built-in tasks through the verbs themselves, each a process of its own that is timed whole."""

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
"""Of the scorer that the plan calls `mini`."""
VALIDATION = 0.05
"""Share of the built-in pretraining pool that its hashes hold out."""
POOL: Final = "pretraining"


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a verb took, by the clock and of the processor's time, and what it left."""

    seconds: float
    cpu_seconds: float
    manifest: Mapping[str, Any]
    bytes: int


def commands(work: Path, per_family: int) -> dict[str, list[str]]:
    """The command line of each step; folders lie in `work`."""
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


def run_steps(work: Path, per_family: int) -> dict[str, Ran]:
    """Runs the steps in a row, on one thread; each step's whole time, start of the process included."""
    found = {}
    for step, flags in commands(work, per_family).items():
        started, before = time.perf_counter(), _processor()
        done = subprocess.run(
            [*COMMAND, step, *flags, "--work", str(work / "work"), "--json"],
            env={**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{step}: {done.stderr}")
        seconds, processor = time.perf_counter() - started, _processor() - before
        target = Path(flags[flags.index("--target") + 1])
        found[step] = Ran(
            seconds=seconds,
            cpu_seconds=processor,
            manifest=json.loads((target / "manifest.json").read_text()),
            bytes=size_of(target),
        )
        print(f"{step}: {seconds:.1f} s, {processor:.1f} s of the processor", flush=True)
    return found


def _processor() -> float:
    """Seconds of the processor that finished children had."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def builtin_volumes(per_family: int, throughput: Throughput) -> Volumes:
    """What `run_steps` has to do, by arithmetic: nothing of the run itself is looked at.

    Which families have choices, and how many, is the families' own; lengths are the measured ones.
    """
    few = list(instances(POOL, num_per_family=1))
    closed = [len(one.choices) for one in few if one.choices]
    prompts, open_prompts = len(few) * per_family, (len(few) - len(closed)) * per_family
    choices, samples = sum(closed) * per_family, open_prompts * SAMPLES
    pairs = choices + samples + 2 * open_prompts
    texts = {one.kind: one for one in throughput.texts_of("builtin")}
    opened, chosen = texts["open-ended"], texts["choices"]
    pair = Lengths(
        tokens=((pairs - choices) * opened.pair_tokens + choices * chosen.pair_tokens) / pairs,
        squared=((pairs - choices) * opened.pair_squared + choices * chosen.pair_squared) / pairs,
    )
    return Volumes(
        prompts=prompts,
        open_prompts=open_prompts,
        pairs=pairs,
        selectable=choices + samples,
        samples={"builtin": SAMPLES},
        prompt=Lengths(tokens=opened.prompt_tokens, squared=opened.prompt_squared),
        response_tokens=opened.response_tokens,
        pair=pair,
        evaluated_pairs=round((choices + samples) * VALIDATION),
        evaluated_pair=pair,
        known=1.0,
    )
