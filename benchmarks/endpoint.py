"""How much time the generator adds to that of the endpoint: many calls at a known latency, beside the ideal.

    python benchmarks/endpoint.py [--calls 1000] [--latency 0.25] [--concurrency 64]

A server of the standard library in a process of its own answers each chat completion after the latency. Ideal is what
the latency alone takes: calls divided by concurrency, rounded up, times latency. Every answer is kept on the disk, as
in a run; the second time all answers come from there. Results go to `benchmarks/results/endpoint.json` with date and
machine.
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
AT_MOST = 1.3
"""Times the ideal that a run may take."""


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--latency", type=float, default=0.25, help="seconds that the server takes over an answer")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(".cappy/benchmarks/endpoint"))
    arguments = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, arguments.latency), daemon=True)
    server.start()
    url = ours.recv()
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
        "at_most": AT_MOST,
    }
    (ROOT / "benchmarks/results/endpoint.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if slowest > AT_MOST * ideal:
        sys.exit(f"benchmarks/endpoint.py: {slowest / ideal:.2f} times the ideal, more than {AT_MOST}")


def measure(url: str, arguments: argparse.Namespace) -> tuple[float, float]:
    """Seconds of one run and of the same run again, which asks nothing."""
    shutil.rmtree(arguments.work, ignore_errors=True)
    terms = EndpointConfig(concurrency=arguments.concurrency, folder=arguments.work)
    seconds = []
    for _ in range(2):
        endpoint = Endpoint(parse_spec(f"openai:m@{url}"), terms)
        started = time.perf_counter()
        drawn = endpoint.sample([f"prompt {i}" for i in range(arguments.calls)], [Decoding(name="sampling")], seed=0)
        seconds.append(time.perf_counter() - started)
        endpoint.close()
        assert all(one.status == "ok" for group in drawn for one in group)
    assert endpoint.usage.requests == 0
    return seconds[0], seconds[1]


def serve(to: Connection, latency: float) -> None:
    """Serves in this process, and sends the address."""
    sys.path.insert(0, str(ROOT / "tests/fakes"))
    from chat_server import Model, serving

    with serving(Model(latency=latency)) as url:
        to.send(url)
        time.sleep(3600)


if __name__ == "__main__":
    main()
