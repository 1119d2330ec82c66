"""What serving costs and carries: pairs a second under 32 clients beside a peer, overhead, and the latency of one pair.

    python benchmarks/serving.py [--size base] [--pools 160] [--rounds 3] [--infinity-python PYTHON]

One scorer folder of RoBERTa's shape with random weights is served in turn by `cappy serve` and by the peer: Infinity
(`--infinity-python`: the Python of another environment, benchmarks/requirements-serving-peer.txt), or, without it, the
FastAPI endpoint around `CrossEncoder.predict` that one would write first. 32 clients each ask for the next pool (an
instruction and its responses, of `shared/data/candidates`) as soon as their last one is answered, over one connection
each, through POST /rerank. Servers take turns, `--rounds` times, and the best round of each counts.

Overhead is the time that the service needs for all pools, beside one call of `Scorer.score` on the same pairs in a
process of its own, with the same threads. Latency is that of one client with one pair, beside `Scorer.forward` of the
same encoded pair. Results go to `benchmarks/results/serving.json` with date and machine.
"""

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
from machine import machine
from scoring_data import LENGTH, Pools, candidate_files, read_pools, scorer_folder

from cappy.scoring import Scorer

ROOT = Path(__file__).resolve().parents[1]
CLIENTS = 32
NAIVE = """
import sys
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import CrossEncoder

model = CrossEncoder(sys.argv[1], device="cpu")
app = FastAPI()

class Request(BaseModel):
    query: str
    documents: list[str]
    model: str = ""

@app.post("/rerank")
def rerank(request: Request):
    scores = model.predict([(request.query, document) for document in request.documents]).tolist()
    ranked = sorted(enumerate(scores), key=lambda one: -one[1])
    return {"results": [{"index": index, "relevance_score": score} for index, score in ranked]}

@app.get("/health")
def health():
    return {}

uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
"""
IN_PROCESS = """
import json, sys, time
from cappy.scoring import Scorer
folder, path, precision = sys.argv[1:]
scorer = Scorer.load(folder, precision=precision)
pairs = [(text, one) for text, pool in json.load(open(path)) for one in pool]
scorer.score(pairs[:8])
started = time.perf_counter()
scorer.score(pairs)
print(time.perf_counter() - started)
"""


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base")
    parser.add_argument("--pools", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="auto", help="of our service; the peers choose by themselves")
    parser.add_argument("--infinity-python", type=Path)
    parser.add_argument("--work", type=Path, default=Path(".cappy/benchmarks/scoring"))
    parser.add_argument("--target", type=Path, default=ROOT / "benchmarks/results/serving.json")
    arguments = parser.parse_args()
    folder = scorer_folder(arguments.size, arguments.work).resolve()
    scorer = Scorer.load(str(folder), precision=arguments.precision)
    pools = real_pools(scorer, arguments.pools)
    servers = {"cappy serve": cappy_server(folder, arguments.precision)}
    if arguments.infinity_python:
        servers["infinity"] = infinity_server(folder, arguments.infinity_python)
    else:
        servers["FastAPI and CrossEncoder"] = naive_server(folder)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    alone: list[float] = []
    for _ in range(arguments.rounds):
        for name, start in servers.items():
            with start() as address:
                rounds[name].append(asyncio.run(run_closed_loop(address, pools)))
                print(name, rounds[name][-1], flush=True)
        alone.append(in_process(folder, pools, arguments))
        print("in process", alone[-1], flush=True)
    pairs = sum(len(pool) for _, pool in pools)
    best = {name: max(found, key=lambda one: one["pairs_per_second"]) for name, found in rounds.items()}
    ours, peer = best["cappy serve"], next(found for name, found in best.items() if name != "cappy serve")
    result = {
        "benchmark": "serving",
        "date": date.today().isoformat(),
        "machine": machine(),
        "shape": arguments.size,
        "precision": scorer.precision,
        "clients": CLIENTS,
        "pools": len(pools),
        "pairs": pairs,
        "servers": best,
        "times_the_peer": ours["pairs_per_second"] / peer["pairs_per_second"],
        "in_process_pairs_per_second": pairs / min(alone),
        "overhead": pairs / min(alone) / ours["pairs_per_second"] - 1,
        "one_pair": one_pair(folder, scorer, pools, arguments.precision),
    }
    arguments.target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def real_pools(scorer: Scorer, count: int) -> Pools:
    """Pools of each set in turn, of at most 8 responses, none longer than the model and no instruction twice.

    Equal pairs of a call are scored once, and one call in process would hold those of all requests.
    """
    files = candidate_files()
    chosen: Pools = []
    for path in files:
        own: Pools = []
        for text, responses in dict(read_pools(path)).items():
            encoded = scorer.encoder.encode([(text, one) for one in responses[:8]])
            if len(own) < -(-count // len(files)) and all(len(pair.ids) < LENGTH for pair in encoded):
                own.append((text, responses[:8]))
        chosen += own
    return chosen[:count]


Start = Callable[[], "contextlib.AbstractContextManager[str]"]


def cappy_server(folder: Path, precision: str) -> Start:
    words = [sys.executable, "-m", "serving", "--scorer", str(folder), "--model-name", "scorer"]
    return lambda: run_server([*words, "--precision", precision, "--port"], "/ready")


def naive_server(folder: Path) -> Start:
    return lambda: run_server([sys.executable, "-c", NAIVE, str(folder)], "/health")


def infinity_server(folder: Path, python: Path) -> Start:
    words = [str(python.parent / "infinity_emb"), "v2", "--model-id", str(folder), "--served-model-name", "scorer"]
    quiet = ["--device", "cpu", "--no-compile", "--no-bettertransformer", "--host", "127.0.0.1", "--port"]
    return lambda: run_server([*words, *quiet], "/health")


@contextlib.contextmanager
def run_server(command: Sequence[str], path: str) -> Iterator[str]:
    """The address of a server on a free port, warm."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "PYTHONPATH": str(ROOT)}
    if "infinity" in command[0]:
        environment.pop("PYTHONPATH")
    process = subprocess.Popen(
        [*command, str(port)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(address + path).status_code == 200:
                    break
            if process.poll() is not None:
                raise SystemExit(f"{command[0]} ended with status {process.returncode}")
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(30)


async def run_closed_loop(address: str, pools: Pools) -> dict[str, float]:
    """All pools by 32 clients: pairs a second, and the latency of their requests in milliseconds."""
    waiting = iter(pools)
    seconds: list[float] = []
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=CLIENTS)) as client:

        async def ask(text: str, pool: Sequence[str]) -> None:
            body = {"model": "scorer", "query": text, "documents": list(pool)}
            began = time.perf_counter()
            answer = await client.post(f"{address}/rerank", json=body)
            answer.raise_for_status()
            assert len(answer.json()["results"]) == len(pool)
            seconds.append(time.perf_counter() - began)

        async def work() -> None:
            for text, pool in waiting:
                await ask(text, pool)

        await ask(*pools[0])
        seconds.clear()
        started = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(CLIENTS)))
        took = time.perf_counter() - started
    return {
        "pairs_per_second": sum(len(pool) for _, pool in pools) / took,
        "p50_milliseconds": median(seconds) * 1e3,
        "p99_milliseconds": quantiles(seconds, n=100)[98] * 1e3,
    }


def in_process(folder: Path, pools: Pools, arguments: argparse.Namespace) -> float:
    """Seconds of one call for all pairs."""
    path = arguments.work / "pools.json"
    path.write_text(json.dumps(pools))
    words = [sys.executable, "-c", IN_PROCESS, str(folder), str(path), arguments.precision]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return float(done.stdout.split()[-1])


def one_pair(folder: Path, scorer: Scorer, pools: Pools, precision: str) -> dict[str, Any]:
    """Median milliseconds of one short pair, through the service and by the bare forward pass, 40 of each in turn."""
    pair = min(((text, pool[0]) for text, pool in pools), key=lambda one: abs(len(one[0]) + len(one[1]) - 200))
    encoded = scorer.encoder.encode([pair])
    served: list[float] = []
    bare: list[float] = []
    with cappy_server(folder, precision)() as address, httpx.Client() as client:
        for _ in range(5):
            for _ in range(40):
                began = time.perf_counter()
                client.post(f"{address}/score", json={"pairs": [pair]}).raise_for_status()
                served.append(time.perf_counter() - began)
            for _ in range(40):
                began = time.perf_counter()
                scorer.forward(encoded)
                bare.append(time.perf_counter() - began)
            time.sleep(0.5)  # threads of a process spin a while after their work, in the other's way
    return {
        "tokens": len(encoded[0].ids),
        "served_p50_milliseconds": median(served) * 1e3,
        "forward_p50_milliseconds": median(bare) * 1e3,
        "added_milliseconds": (median(served) - median(bare)) * 1e3,
    }


if __name__ == "__main__":
    main()
