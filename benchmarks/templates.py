"""Rendering speed of PromptSource's templates in limited child processes, compared with another checkout.

    python benchmarks/templates.py [--before FOLDER] [--rounds 7]

Reads the templates and the held-out tasks under `shared/data` (or `--data FOLDER`) and renders real rows with all
templates of their dataset. `--before` is another checkout of the project; both are measured in turn in each round, each
in a new interpreter, so that other work on the machine in one round does not change the medians. CPU seconds include
child processes. Results are written to `benchmarks/results/` as JSON with date and machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from datetime import date
from pathlib import Path

from machine import machine

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared/data"
DATASETS = {
    "super_glue/rte": "super_glue_rte.validation",
    "anli": "anli_r1.test",
    "winogrande/winogrande_xl": "winogrande_xl.validation",
    "hellaswag": "hellaswag.validation",
    "story_cloze/2016": "story_cloze_2016.validation",
}
ARM = """
import gzip, json, os, sys, time
from itertools import islice
from pathlib import Path
from cappy.errors import RecordError
from cappy.preparation import templates as library

def render_one(template, row):
    try:
        return library.render(template, row)
    except RecordError as error:
        return error

def results(rows, templates):
    if hasattr(library, "render_rows"):
        return library.render_rows((row, templates) for row in rows)
    return ([render_one(template, row) for template in templates] for row in rows)

def used():
    module = sys.modules.get("cappy.rendering.process")
    ticks = 0
    for child in module._processes if module else ():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return sum(os.times()[:2]) + ticks / os.sysconf("SC_CLK_TCK")

data, dataset, file, most = Path(sys.argv[1]), *sys.argv[2:4], int(sys.argv[4])
templates = library.load_templates(data / "templates/templates", dataset)
with gzip.open(data / f"heldout_tasks/{file}.jsonl.gz", "rt") as lines:
    rows = [json.loads(line) for line in islice(lines, most)]
list(results(rows[:20], templates))
start, before = time.perf_counter(), used()
rendered = [one for found in results(rows, templates) for one in found]
wall, cpu = time.perf_counter() - start, used() - before
print(json.dumps({"rows": len(rows), "prompts": len(rendered), "wall": wall, "cpu": cpu}))
"""


def main() -> None:
    """Measures all datasets and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of templates and held-out tasks")
    parser.add_argument("--before", type=Path, help="another checkout of the project to measure in turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=1000, help="maximum number of rows of a dataset")
    arguments = parser.parse_args()
    arms = {"before": arguments.before, "now": ROOT} if arguments.before else {"now": ROOT}
    measured: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for round_index in range(arguments.rounds):
        for dataset, file in DATASETS.items():
            for arm in sorted(arms, reverse=bool(round_index % 2)):
                measured[dataset, arm].append(measure(arms[arm], arguments.data, dataset, file, arguments.rows))
    table = {dataset: {arm: summary(measured[dataset, arm]) for arm in arms} for dataset in DATASETS}
    if arguments.before:
        for row in table.values():
            row["ratio"] = {
                name: round(row["now"][name] / row["before"][name], 2)
                for name in ("rows_per_second", "cpu_us_per_prompt")
            }
    result = {
        "benchmark": "templates",
        "date": date.today().isoformat(),
        "machine": machine(),
        "rounds": arguments.rounds,
        "load": [round(load, 1) for load in os.getloadavg()],
        "datasets": table,
    }
    (ROOT / "benchmarks/results/templates.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def measure(checkout: Path, data: Path, dataset: str, file: str, rows: int) -> dict[str, float]:
    """One run of one checkout on one dataset."""
    command = [sys.executable, "-P", "-c", ARM, str(data), dataset, file, str(rows)]
    process = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(checkout)}, capture_output=True, check=True)
    result: dict[str, float] = json.loads(process.stdout)
    return result


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    """Medians over the rounds."""
    return {
        "rows": runs[0]["rows"],
        "prompts": runs[0]["prompts"],
        "rows_per_second": round(statistics.median(run["rows"] / run["wall"] for run in runs)),
        "best_rows_per_second": round(max(run["rows"] / run["wall"] for run in runs)),
        "cpu_us_per_prompt": round(statistics.median(1e6 * run["cpu"] / run["prompts"] for run in runs), 1),
    }


if __name__ == "__main__":
    main()
