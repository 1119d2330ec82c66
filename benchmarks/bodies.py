"""Cost of the worst request bodies in both services: seconds, memory, and the latency of /health meanwhile.

    python benchmarks/bodies.py [--service serve|gateway]

Sends bodies of 8 MB and bodies with the maximum number of values, of about 60 kinds for each list in a request, one by
one to a separate process whose scorer and LLM cost nothing: only parsing, validation and responses are measured.
Results are written to `benchmarks/results/bodies.json` with date and machine.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from machine import machine

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "fakes"))

from worst_bodies import CHAT_PLACES, MEGABYTES, PLACES, Cost, bodies, service, tensors  # noqa: E402 (the tests' own)

WORST = 5
VALUES = {"serve": 32_768, "gateway": 10_000}


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--service", choices=("serve", "gateway"))
    arguments = parser.parse_args()
    path = ROOT / "benchmarks" / "results" / "bodies.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results |= {"date": date.today().isoformat(), "machine": machine()}
    for name in (arguments.service,) if arguments.service else ("serve", "gateway"):
        results[name] = summary(measure(name))
        print(json.dumps(results[name], indent=1))
    path.write_text(json.dumps(results, indent=1) + "\n")


def measure(name: str) -> list[Cost]:
    """The cost of every body against one service."""
    costs = []
    with service(*(("--max-seconds", "30") if name == "gateway" else ())) as watched:
        watched.cost("the first request", "/", b"")
        places = CHAT_PLACES if name == "gateway" else PLACES
        for kind, path, body in bodies(places, MEGABYTES, VALUES[name]):
            costs.append(watched.cost(kind, path, body))
        if name == "serve":
            costs += [watched.cost(*body) for body in tensors(MEGABYTES)]
    return costs


def summary(costs: Sequence[Cost]) -> dict[str, Any]:
    """How many bodies, the statuses they got, and the worst by each measure."""
    worst = {
        measure: [asdict(cost) for cost in sorted(costs, key=lambda cost: -getattr(cost, measure))[:WORST]]
        for measure in ("seconds", "megabytes", "health_seconds")
    }
    statuses = sorted({cost.status for cost in costs})
    return {
        "bodies": len(costs),
        "statuses": {str(status): sum(cost.status == status for cost in costs) for status in statuses},
        "worst_by": worst,
    }


if __name__ == "__main__":
    main()
