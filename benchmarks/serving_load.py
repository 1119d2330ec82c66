"""Ten minutes of twice what the service can do, and SIGTERM in the middle of it: what came of every request.

    python benchmarks/serving_load.py [--seconds 600]

The built-in scorer behind `cappy serve`, real pools of `shared/data/candidates`. Its capacity is what 16 clients get
who wait for their answers; then requests come at twice that rate, whatever comes back. Every 200 is compared with the
score that the scorer gives in process. Memory is the process's own, once a second; its growth is the median of the last
quarter beside that of the second. At the end SIGTERM comes while requests go on until /ready is no longer 200, as a
balancer would have it. Results go to `benchmarks/results/serving-load.json` with date and machine.
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
    """Measures and writes what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--target", type=Path, default=ROOT / "benchmarks/results/serving-load.json")
    arguments = parser.parse_args()
    pools = [
        [(text, one) for one in pool[:8]] for path in candidate_files() for text, pool in read_pools(path)[:20] if pool
    ]
    right = dict.fromkeys(pair for pool in pools for pair in pool)
    scorer = Scorer.load("builtin")
    scores = dict(zip(right, scorer.score(list(right)), strict=True))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        words = ["-m", "serving", "--scorer", "builtin", "--port", str(port)]
        process = subprocess.Popen([sys.executable, *words], stderr=log, cwd=ROOT)
        address = f"http://127.0.0.1:{port}"
        until_ready(address)
        result = asyncio.run(measure(address, pools, scores, process, arguments.seconds))
        result["exit status"] = process.wait(60)
    found = {"benchmark": "serving_load", "date": date.today().isoformat(), "machine": machine(), **result}
    arguments.target.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def until_ready(address: str) -> None:
    """Waits until the service has answered its probe."""
    for _ in range(600):
        try:
            if httpx.get(f"{address}/ready").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise SystemExit("the service does not start")


async def measure(
    address: str,
    pools: list[list[Pair]],
    scores: dict[Pair, float],
    process: "subprocess.Popen[bytes]",
    seconds: float,
) -> dict[str, Any]:
    """The long run, then a short one that SIGTERM ends."""

    def expected(version: str, pair: Pair) -> float:
        return scores[pair]

    able = await capacity(address, pools, clients=16, seconds=10)
    common: dict[str, Any] = {"rate": 2 * able, "process": process.pid}
    long = await overload(address, pools, expected, seconds=seconds, **common)
    asyncio.get_running_loop().call_later(5, process.send_signal, signal.SIGTERM)
    last = await overload(address, pools, expected, seconds=30, stop_when_unready=True, **common)
    memory = [round(size / 2**20) for size in long.memory[:: max(1, int(seconds / 20))]]
    return {
        "requests a second that it can answer": able,
        "seconds": seconds,
        "long run": summarize(long) | {"memory in MB": memory},
        "with SIGTERM": summarize(last),
    }


def summarize(outcome: Outcome) -> dict[str, Any]:
    """What of an outcome is kept."""
    found: dict[str, Any] = {"answers": dict(outcome.answers), "wrong": outcome.wrong[:5]}
    return found | ({"growth of memory": outcome.growth} if len(outcome.memory) >= 16 else {})


if __name__ == "__main__":
    main()
