"""Sends twice the capacity of the service for ten minutes, then SIGTERM under load, and counts all outcomes.

    python benchmarks/serving_load.py [--seconds 600]

`cappy serve` runs the built-in scorer on real pools of `shared/data/candidates`. The capacity is the rate of 16 clients
that wait for their answers; then requests are sent at twice that rate. The scores of every 200 are compared with those
of the scorer in process. The memory of the process is sampled once a second; its growth compares the median of the last
quarter with that of the second. At the end SIGTERM is sent while requests continue until /ready is no longer 200, like
those of a load balancer. Results are written to `benchmarks/results/serving-load.json` with date and machine.
"""

import argparse
import asyncio
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import httpx
from machine import machine
from scoring_data import candidate_files, read_pools

from cappy.scoring import Scorer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "fakes"))

from load import Outcome, Pair, capacity, overload  # noqa: E402 (the tests' own load)


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--target", type=Path, default=ROOT / "benchmarks/results/serving-load.json")
    arguments = parser.parse_args()
    pools = [
        [(text, response) for response in pool[:8]]
        for path in candidate_files()
        for text, pool in read_pools(path)[:20]
        if pool
    ]
    pairs = dict.fromkeys(pair for pool in pools for pair in pool)
    scorer = Scorer.load("builtin:tiny")
    scores = dict(zip(pairs, scorer.score(list(pairs)), strict=True))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        options = ["-m", "serving", "--scorer", "builtin:tiny", "--port", str(port)]
        process = subprocess.Popen([sys.executable, *options], stderr=log, cwd=ROOT)
        address = f"http://127.0.0.1:{port}"
        wait_until_ready(address)
        result = asyncio.run(measure(address, pools, scores, process, arguments.seconds))
        result["exit status"] = process.wait(60)
    report = {"benchmark": "serving_load", "date": date.today().isoformat(), "machine": machine(), **result}
    arguments.target.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def wait_until_ready(address: str) -> None:
    """Waits until the service is ready."""
    for _ in range(600):
        try:
            if httpx.get(f"{address}/ready").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise SystemExit("benchmarks/serving_load.py: the service did not start")


async def measure(
    address: str,
    pools: list[list[Pair]],
    scores: dict[Pair, float],
    process: "subprocess.Popen[bytes]",
    seconds: float,
) -> dict[str, Any]:
    """The long run, then a short one with SIGTERM."""

    def expected(version: str, pair: Pair) -> float:
        return scores[pair]

    rate = await capacity(address, pools, clients=16, seconds=10)
    common: dict[str, Any] = {"rate": 2 * rate, "process": process.pid}
    long_run = await overload(address, pools, expected, seconds=seconds, **common)
    asyncio.get_running_loop().call_later(5, process.send_signal, signal.SIGTERM)
    sigterm_run = await overload(address, pools, expected, seconds=30, stop_when_unready=True, **common)
    memory = [round(size / 2**20) for size in long_run.memory[:: max(1, int(seconds / 20))]]
    return {
        "requests a second that it can answer": rate,
        "seconds": seconds,
        "long run": summarize(long_run) | {"memory in MB": memory},
        "with SIGTERM": summarize(sigterm_run),
    }


def summarize(outcome: Outcome) -> dict[str, Any]:
    """The reported values of an outcome."""
    facts: dict[str, Any] = {"answers": dict(outcome.answers), "wrong": outcome.wrong[:5]}
    return facts | ({"growth of memory": outcome.growth} if len(outcome.memory) >= 16 else {})


if __name__ == "__main__":
    main()
