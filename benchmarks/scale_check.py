"""The plan beside a real run at 1/10,000 of the paper's 160 million rows: built-in tasks, built-in LLM, a small scorer.

    python benchmarks/scale_check.py [--per-family 118] [--compare]

The steps are the verbs themselves, processes on one thread each (`builtin_steps.py`). Predicted is by the code of
`cappy plan` with the speeds in `benchmarks/results/throughput.json`, from arithmetic over the task families alone:
nothing of the run is known to the prediction, and the benchmark timed fewer instances of other seeds, but for the
seconds that a verb takes to start: those are from the same verbs on a fifteenth of this run's instances.
Beside the seconds of the processor, which the benchmark measured too, stand those of the clock: where other work
shares the machine they say little. Results go to `benchmarks/results/scale-check.json` with date and machine.
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

from builtin_steps import SAMPLES, VALIDATION, Ran, builtin_volumes, commands, run_steps, size_of
from machine import machine
from throughput_texts import round_digits

from cappy.costing import DEFAULT, PlanConfig, read_throughput
from cappy.costing.costs import END, Work, cost, list_work
from cappy.costing.volumes import Volumes
from cappy.records import read

ROOT = Path(__file__).resolve().parents[1]
ONE_OF = 10_000
RAN = "ran.json"


def main() -> None:
    """Predicts, runs, and writes both side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-family", type=int, default=118, help="instances of each built-in family")
    parser.add_argument("--work", type=Path, default=Path(".cappy/benchmarks/scale-check"))
    parser.add_argument("--compare", action="store_true", help="predict the last run anew, run nothing")
    arguments = parser.parse_args()
    throughput = read_throughput(DEFAULT)
    volumes = builtin_volumes(arguments.per_family, throughput)
    config = PlanConfig(hardware="cpu", mixture="builtin", scorer="mini", validation=VALIDATION)
    planned = list_work(volumes, throughput, config)
    predicted = seconds_of(planned, config)
    print(f"{volumes.pairs:,} rows, predicted seconds {predicted}", flush=True)
    if not arguments.compare:
        run(arguments.work, arguments.per_family)
    facts = json.loads((arguments.work / RAN).read_text())
    ran = {step: Ran(**one) for step, one in facts.pop("steps").items()}
    result = {
        "benchmark": "scale check",
        **facts,
        "threads": 1,
        "one_of": ONE_OF,
        "commands": [
            f"cappy {step} {' '.join(flags)}" for step, flags in commands(Path(), arguments.per_family).items()
        ],
        "volumes": compare_volumes(volumes, planned, ran, arguments.work),
        "steps": compare_steps(predicted, planned, ran),
    }
    (ROOT / "benchmarks/results/scale-check.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def run(work: Path, per_family: int) -> None:
    """Runs the steps and keeps what they took in the work folder."""
    shutil.rmtree(work, ignore_errors=True)
    load = os.getloadavg()[0]
    steps = {step: asdict(one) for step, one in run_steps(work, per_family).items()}
    told = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "load": [round_digits(load), round_digits(os.getloadavg()[0])],
    }
    (work / RAN).write_text(json.dumps({**told, "steps": steps}))


def seconds_of(planned: list[Work], config: PlanConfig) -> dict[str, float]:
    """Seconds of each step on one core; what pretraining tokenizes counts as its own."""
    found: dict[str, float] = {}
    for work in planned:
        name = "pretraining" if work.step == "tokenization" else work.step
        found[name] = found.get(name, 0.0) + cost(work, 1, config, cores=1).seconds
    return {name: round_digits(seconds) for name, seconds in found.items()}


def compare_steps(predicted: Mapping[str, float], planned: list[Work], ran: Mapping[str, Ran]) -> dict[str, Any]:
    """Of each step and of all together: seconds predicted, of the processor and of the clock.

    `off` is the share by which the processor's seconds exceed the predicted ones.
    """
    rows = {
        step: {
            "predicted_seconds": predicted[step],
            "measured_seconds": round_digits(one.cpu_seconds),
            "by_the_clock": round_digits(one.seconds),
            "off": round_digits(one.cpu_seconds / predicted[step] - 1),
            "of_it_start": round_digits(sum(work.start for work in planned if work.step == step)),
        }
        for step, one in ran.items()
    }
    whole = {name: sum(row[name] for row in rows.values()) for name in next(iter(rows.values())) if name != "off"}
    whole["off"] = whole["measured_seconds"] / whole["predicted_seconds"] - 1
    return {**rows, "all": {name: round_digits(value) for name, value in whole.items()}}


def compare_volumes(volumes: Volumes, planned: list[Work], ran: Mapping[str, Ran], work: Path) -> dict[str, Any]:
    """Rows, tokens and bytes, predicted and found; duplicates are dropped before training, which no plan knows."""
    drawn = [one for instance in read(work / "sampled") for one in instance.candidates if one.source == "llm"]
    trained = [json.loads(path.read_text()) for path in (work / "work/tokens").glob("*/*/facts.json")]
    tokens = sum(one.num_tokens or 0 for one in drawn)
    of_bytes = {one.step: one.bytes for one in planned}
    pairs = {
        "prompts": (volumes.prompts, ran["preparation"].manifest["metrics"]["instances"]),
        "candidates": (volumes.open_prompts * SAMPLES, len(drawn)),
        "rows": (volumes.pairs, ran["annotation"].manifest["metrics"]["candidates"]),
        "rows_to_train_on": (volumes.pairs, sum(one["pairs"] for one in trained)),
        "sampled_tokens": (volumes.candidates * (volumes.response_tokens + END), tokens),
        "bytes_prepared": (of_bytes["preparation"], ran["preparation"].bytes),
        "bytes_sampled": (of_bytes["sampling"], ran["sampling"].bytes),
        "bytes_annotated": (of_bytes["annotation"], ran["annotation"].bytes),
        "bytes_of_tokens": (of_bytes["tokenization"], size_of(work / "work/tokens")),
    }
    return {
        name: {"predicted": round_digits(one), "found": round_digits(other), "off": round_digits(other / one - 1)}
        for name, (one, other) in pairs.items()
    }


if __name__ == "__main__":
    main()
