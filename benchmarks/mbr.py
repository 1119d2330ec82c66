"""Milliseconds of MBR for a pool of 64 responses: E2E's, and random words of several lengths.

    python benchmarks/mbr.py

Writes `benchmarks/results/mbr.json`: median and 90th percentile over 100 pools.
"""

import gzip
import json
import random
import time
from datetime import date
from itertools import chain, cycle, islice

import numpy as np
from machine import machine
from selection import CANDIDATES, ROOT

from cappy.selection.pools import mbr

SIZE, POOLS = 64, 100
LENGTHS = (25, 100, 200)


def main() -> None:
    """Measures every kind of pool and writes the results."""
    with gzip.open(CANDIDATES / "e2e_nlg.jsonl.gz", "rt") as file:
        rows = [[candidate["text"] for candidate in json.loads(line)["candidates"]] for line in islice(file, POOLS)]
    vocabulary = [word for text in chain.from_iterable(rows) for word in text.split()]
    rng = random.Random(0)
    pools = {"e2e_nlg": [list(islice(cycle(row), SIZE)) for row in rows]} | {
        f"{length} random words": [
            [" ".join(rng.choices(vocabulary, k=length)) for _ in range(SIZE)] for _ in range(POOLS)
        ]
        for length in LENGTHS
    }
    result = {
        "benchmark": "mbr",
        "date": date.today().isoformat(),
        "machine": machine(),
        "responses": SIZE,
        "milliseconds": {name: measure(responses) for name, responses in pools.items()},
    }
    (ROOT / "benchmarks/results/mbr.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def measure(pools: list[list[str]]) -> dict[str, float]:
    """Median and 90th percentile of the milliseconds of a pool, after one pool to warm up."""
    mbr(pools[0])
    seconds = []
    for responses in pools:
        started = time.perf_counter()
        mbr(responses)
        seconds.append(time.perf_counter() - started)
    median, high = np.percentile(seconds, [50, 90])
    return {"median": round(1e3 * float(median), 2), "90th percentile": round(1e3 * float(high), 2)}


if __name__ == "__main__":
    main()
