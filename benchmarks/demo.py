"""Time, memory and results of `make demo`, for several seeds, each in a new folder.

    python benchmarks/demo.py [--seeds 0 1 2]

Runs the command of the Makefile in an empty folder (without a cache), then once more to time the cache. Memory is the
sum of the proportional set sizes (Pss) of all processes of the run, sampled five times a second; Linux only. Results
are written to `benchmarks/results/demo.json`.
"""

import argparse
import json
import shlex
import subprocess
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from machine import machine

ROOT = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.2


def main() -> None:
    """Measures every seed and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of splits, samples and training")
    runs = []
    seeds = parser.parse_args().seeds
    for seed in seeds:
        runs.append(measure(seed))
        print(json.dumps({key: value for key, value in runs[-1].items() if key != "selectors"}), flush=True)
    result = {
        "benchmark": "demo",
        "date": date.today().isoformat(),
        "machine": machine(),
        "command": f"python benchmarks/demo.py --seeds {' '.join(map(str, seeds))}",
        "runs": runs,
    }
    target = ROOT / "benchmarks/results/demo.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(target.relative_to(ROOT))


def measure(seed: int) -> dict[str, Any]:
    """Seconds, peak memory and results of one demo, and the seconds of a second run."""
    arguments = [*command(), "--seed", str(seed), "--json"]
    with tempfile.TemporaryDirectory() as folder:
        seconds, peak, outcome = time_command(arguments, Path(folder))
        again, _, cached = time_command(arguments, Path(folder))
        report = json.loads((Path(folder) / outcome["report"]).with_name("report.json").read_text())
    return {
        "seed": seed,
        "seconds": round(seconds),
        "seconds_by_step": {step: round(value, 1) for step, value in outcome["seconds"].items()},
        "peak_gib": round(peak / 2**30, 2),
        "seconds_again": round(again),
        "from_cache": cached["from_cache"],
        "instances": report["facts"]["instances"],
        "decision": outcome["decision"],
        "comparisons": {key: value for key, value in report["comparisons"].items() if key.startswith("selector-")},
        "selectors": outcome["selectors"],
    }


def command() -> list[str]:
    """The command of `make demo`, with the absolute path of its program."""
    make = ["make", "--dry-run", "--silent", "--directory", str(ROOT), "demo"]
    lines = subprocess.run(make, capture_output=True, text=True, check=True).stdout.splitlines()
    program, *arguments = shlex.split(next(line for line in reversed(lines) if "cappy adapt" in line))
    return [str(ROOT / program), *arguments]


def time_command(arguments: Sequence[str], folder: Path) -> tuple[float, int, dict[str, Any]]:
    """Seconds, peak bytes and printed JSON of a command in `folder`."""
    started = time.monotonic()
    process = subprocess.Popen(arguments, cwd=folder, stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(memory(pid) for pid in descendants(process.pid)))
        time.sleep(POLL_SECONDS)
    seconds = time.monotonic() - started
    assert process.stdout is not None
    if process.returncode:
        raise SystemExit(f"benchmarks/demo.py: the command ended with status {process.returncode}")
    return seconds, peak, json.loads(process.stdout.read())


def descendants(root: int) -> set[int]:
    """A process and all of its descendants."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    pids = {root}
    while children := {pid for pid, parent in parents.items() if parent in pids} - pids:
        pids |= children
    return pids


def memory(pid: int) -> int:
    """The Pss of a process in bytes; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


if __name__ == "__main__":
    main()
