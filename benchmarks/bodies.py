"""What the worst bodies cost both services: seconds, memory, and how long /health waits meanwhile.

    python benchmarks/bodies.py [--service serve|gateway]

Bodies of 8 MB and bodies with as many values as may be, of about 60 kinds in each place of a request that holds a list,
one after the other against a process of its own, whose scorer and LLM cost nothing: what is measured is reading,
checking, refusing and writing. Results go to `benchmarks/results/bodies.json` with date and machine.
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
    """Measures and writes what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--service", choices=("serve", "gateway"))
    asked = parser.parse_args()
    path = ROOT / "benchmarks" / "results" / "bodies.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    found |= {"date": date.today().isoformat(), "machine": machine()}
    for name in (asked.service,) if asked.service else ("serve", "gateway"):
        found[name] = summary(measure(name))
        print(json.dumps(found[name], indent=1))
    path.write_text(json.dumps(found, indent=1) + "\n")


def measure(name: str) -> list[Cost]:
    """The cost of every body against one service."""
    costs = []
    with service(*(("--max-seconds", "30") if name == "gateway" else ())) as watched:
        watched.cost("the first request", "/", b"")
        places = CHAT_PLACES if name == "gateway" else PLACES
        for kind, path, body in bodies(places, MEGABYTES, VALUES[name]):
            costs.append(watched.cost(kind, path, body))
        if name == "serve":
            costs += [watched.cost(*one) for one in tensors(MEGABYTES)]
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
