"""Overhead of the endpoint generator: many calls at a known latency, compared with the ideal time.

    python benchmarks/endpoint.py [--calls 1000] [--latency 0.25] [--concurrency 64]

A server in a separate process answers each chat completion after the latency. The ideal time is the number of calls
divided by the concurrency, rounded up, times the latency. Every answer is stored on disk, as in a run; in the second
run all answers come from there. Results are written to `benchmarks/results/endpoint.json` with date and machine.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import sys
import time
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path

from machine import machine

from cappy.sampling.endpoint import Endpoint
from cappy.sampling.generators import EndpointConfig
from cappy.sampling.strategies import Decoding
from cappy.specs import parse_spec

ROOT = Path(__file__).resolve().parents[1]
MAX_TIMES_IDEAL = 1.3
"""The limit of a run's time, as a multiple of the ideal."""


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--latency", type=float, default=0.25, help="seconds that the server takes for an answer")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(".cappy/benchmarks/endpoint"))
    arguments = parser.parse_args()
    connection, server_connection = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(
        target=serve, args=(server_connection, arguments.latency), daemon=True
    )
    server.start()
    url = connection.recv()
    rounds = [measure(url, arguments) for _ in range(arguments.rounds)]
    server.terminate()
    ideal = math.ceil(arguments.calls / arguments.concurrency) * arguments.latency
    slowest = max(seconds for seconds, _ in rounds)
    result = {
        "benchmark": "endpoint",
        "date": date.today().isoformat(),
        "machine": machine(),
        "load_average": os.getloadavg()[0],
        "calls": arguments.calls,
        "latency_s": arguments.latency,
        "concurrency": arguments.concurrency,
        "ideal_s": ideal,
        "asked_s": [seconds for seconds, _ in rounds],
        "from_disk_s": [seconds for _, seconds in rounds],
        "times_ideal": slowest / ideal,
        "at_most": MAX_TIMES_IDEAL,
    }
    (ROOT / "benchmarks/results/endpoint.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if slowest > MAX_TIMES_IDEAL * ideal:
        sys.exit(f"benchmarks/endpoint.py: {slowest / ideal:.2f} times the ideal, more than {MAX_TIMES_IDEAL}")


def measure(url: str, arguments: argparse.Namespace) -> tuple[float, float]:
    """Seconds of one run, and of a second one, which sends no requests."""
    shutil.rmtree(arguments.work, ignore_errors=True)
    config = EndpointConfig(concurrency=arguments.concurrency, folder=arguments.work)
    seconds = []
    for _ in range(2):
        endpoint = Endpoint(parse_spec(f"openai:m@{url}"), config)
        started = time.perf_counter()
        candidates = endpoint.sample(
            [f"prompt {i}" for i in range(arguments.calls)], [Decoding(name="sampling")], seed=0
        )
        seconds.append(time.perf_counter() - started)
        endpoint.close()
        assert all(candidate.status == "ok" for group in candidates for candidate in group)
    assert endpoint.usage.requests == 0
    return seconds[0], seconds[1]


def serve(connection: Connection, latency: float) -> None:
    """Serves in this process and sends its address to `connection`."""
    sys.path.insert(0, str(ROOT / "tests/fakes"))
    from chat_server import Model, serving

    with serving(Model(latency=latency)) as url:
        connection.send(url)
        time.sleep(3600)


if __name__ == "__main__":
    main()
