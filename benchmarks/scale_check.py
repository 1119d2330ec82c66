"""Compares `cappy plan` with a real run at 1/10,000 of the paper's 160 million rows, on the built-in tasks.

    python benchmarks/scale_check.py [--per-family 118] [--compare]

The run uses the built-in LLM and a small scorer. Its steps are CLI commands with one thread each (`builtin_steps.py`).
The prediction is by the code of `cappy plan` with the speeds in `benchmarks/results/throughput.json`. It uses nothing
of the run: volumes are computed from the task families, speeds were measured on fewer instances with other seeds, and
start times on a fifteenth of this run's instances. Predicted and measured are CPU seconds; wall-clock seconds are
listed too, but depend on other work on the machine. Results are written to `benchmarks/results/scale-check.json` with
date and machine.
"""

import argparse
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from builtin_steps import SAMPLES, VALIDATION, StepRun, builtin_volumes, commands, run_steps, size_of
from machine import machine
from throughput_texts import round_digits

from cappy.costing import DEFAULT_THROUGHPUT_PATH, PlanConfig, read_throughput
from cappy.costing.costs import END_TOKENS, Work, cost, list_work
from cappy.costing.volumes import Volumes
from cappy.records import read

ROOT = Path(__file__).resolve().parents[1]
ONE_OF = 10_000
RUNS_FILE = "ran.json"


def main() -> None:
    """Predicts, runs, and writes a comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-family", type=int, default=118, help="instances of each built-in family")
    parser.add_argument("--work", type=Path, default=Path(".cappy/benchmarks/scale-check"))
    parser.add_argument("--compare", action="store_true", help="only predict the last run again, without a new run")
    arguments = parser.parse_args()
    throughput = read_throughput(DEFAULT_THROUGHPUT_PATH)
    volumes = builtin_volumes(arguments.per_family, throughput)
    config = PlanConfig(hardware="cpu", mixture="builtin", scorer="mini", validation=VALIDATION)
    planned = list_work(volumes, throughput, config)
    predicted = seconds_of(planned, config)
    print(f"{volumes.pairs:,} rows, predicted seconds {predicted}", flush=True)
    if not arguments.compare:
        run(arguments.work, arguments.per_family)
    facts = json.loads((arguments.work / RUNS_FILE).read_text())
    runs = {step: StepRun(**values) for step, values in facts.pop("steps").items()}
    result = {
        "benchmark": "scale check",
        **facts,
        "threads": 1,
        "one_of": ONE_OF,
        "commands": [
            f"cappy {step} {' '.join(flags)}" for step, flags in commands(Path(), arguments.per_family).items()
        ],
        "volumes": compare_volumes(volumes, planned, runs, arguments.work),
        "steps": compare_steps(predicted, planned, runs),
    }
    (ROOT / "benchmarks/results/scale-check.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def run(work: Path, per_family: int) -> None:
    """Runs the steps and writes their times into the work folder."""
    shutil.rmtree(work, ignore_errors=True)
    load = os.getloadavg()[0]
    steps = {step: asdict(run) for step, run in run_steps(work, per_family).items()}
    run_facts = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "load": [round_digits(load), round_digits(os.getloadavg()[0])],
    }
    (work / RUNS_FILE).write_text(json.dumps({**run_facts, "steps": steps}))


def seconds_of(planned: list[Work], config: PlanConfig) -> dict[str, float]:
    """Predicted seconds of each step on one core; tokenization counts as part of pretraining."""
    seconds_by_step: dict[str, float] = {}
    for work in planned:
        name = "pretraining" if work.step == "tokenization" else work.step
        seconds_by_step[name] = seconds_by_step.get(name, 0.0) + cost(work, 1, config, cores=1).seconds
    return {name: round_digits(seconds) for name, seconds in seconds_by_step.items()}


def compare_steps(predicted: Mapping[str, float], planned: list[Work], runs: Mapping[str, StepRun]) -> dict[str, Any]:
    """Predicted, CPU and wall-clock seconds of each step and of all together.

    `off` is the relative difference of CPU seconds to predicted seconds.
    """
    rows = {
        step: {
            "predicted_seconds": predicted[step],
            "measured_seconds": round_digits(run.cpu_seconds),
            "by_the_clock": round_digits(run.seconds),
            "off": round_digits(run.cpu_seconds / predicted[step] - 1),
            "of_it_start": round_digits(sum(work.start for work in planned if work.step == step)),
        }
        for step, run in runs.items()
    }
    totals = {name: sum(row[name] for row in rows.values()) for name in next(iter(rows.values())) if name != "off"}
    totals["off"] = totals["measured_seconds"] / totals["predicted_seconds"] - 1
    return {**rows, "all": {name: round_digits(value) for name, value in totals.items()}}


def compare_volumes(volumes: Volumes, planned: list[Work], runs: Mapping[str, StepRun], work: Path) -> dict[str, Any]:
    """Predicted and measured rows, tokens and bytes; the plan ignores that duplicates are dropped before training."""
    sampled_candidates = [
        candidate
        for instance in read(work / "sampled")
        for candidate in instance.candidates
        if candidate.source == "llm"
    ]
    corpus_facts = [json.loads(path.read_text()) for path in (work / "work/tokens").glob("*/*/facts.json")]
    tokens = sum(candidate.num_tokens or 0 for candidate in sampled_candidates)
    planned_bytes = {item.step: item.bytes for item in planned}
    pairs = {
        "prompts": (volumes.prompts, runs["preparation"].manifest["metrics"]["instances"]),
        "candidates": (volumes.open_prompts * SAMPLES, len(sampled_candidates)),
        "rows": (volumes.pairs, runs["annotation"].manifest["metrics"]["candidates"]),
        "rows_to_train_on": (volumes.pairs, sum(facts["pairs"] for facts in corpus_facts)),
        "sampled_tokens": (volumes.candidates * (volumes.response_tokens + END_TOKENS), tokens),
        "bytes_prepared": (planned_bytes["preparation"], runs["preparation"].bytes),
        "bytes_sampled": (planned_bytes["sampling"], runs["sampling"].bytes),
        "bytes_annotated": (planned_bytes["annotation"], runs["annotation"].bytes),
        "bytes_of_tokens": (planned_bytes["tokenization"], size_of(work / "work/tokens")),
    }
    return {
        name: {
            "predicted": round_digits(predicted),
            "found": round_digits(measured),
            "off": round_digits(measured / predicted - 1),
        }
        for name, (predicted, measured) in pairs.items()
    }


if __name__ == "__main__":
    main()
