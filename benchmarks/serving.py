"""Serving throughput with 32 clients, compared with another server; overhead; and the latency of one pair.

    python benchmarks/serving.py [--size base] [--pools 160] [--rounds 3] [--infinity-python PYTHON]

A scorer folder of RoBERTa's shape with random weights is served in turn by `cappy serve` and by another server:
Infinity (`--infinity-python`: the Python of another environment, benchmarks/requirements-serving-peer.txt), or else a
naive FastAPI endpoint around `CrossEncoder.predict`. Each of 32 clients sends POST /rerank with the next pool (an
instruction and its responses, from `shared/data/candidates`) as soon as its last request is answered, over one
connection. Servers take turns, `--rounds` times, and the best round of each counts.

The overhead compares the time of the service for all pools with one call of `Scorer.score` on the same pairs in a
separate process with the same number of threads. The latency is that of one client with one pair, compared with
`Scorer.infer_logits` of the same encoded pair. Results are written to `benchmarks/results/serving.json` with date and
machine.
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
    parser.add_argument("--precision", default="auto", help="precision of our service; other servers use their default")
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
        alone.append(time_in_process(folder, pools, arguments))
        print("in process", alone[-1], flush=True)
    pairs = sum(len(pool) for _, pool in pools)
    best = {name: max(results, key=lambda result: result["pairs_per_second"]) for name, results in rounds.items()}
    ours, peer = best["cappy serve"], next(results for name, results in best.items() if name != "cappy serve")
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
        "one_pair": time_one_pair(folder, scorer, pools, arguments.precision),
    }
    arguments.target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def real_pools(scorer: Scorer, count: int) -> Pools:
    """Pools from each set, with at most 8 responses, no pair longer than the model, and no instruction twice.

    A call scores equal pairs once, so duplicates would favour the single call in process.
    """
    files = candidate_files()
    chosen: Pools = []
    for path in files:
        pools_of_file: Pools = []
        for text, responses in dict(read_pools(path)).items():
            encoded = scorer.encoder.encode([(text, response) for response in responses[:8]])
            if len(pools_of_file) < -(-count // len(files)) and all(len(pair.ids) < LENGTH for pair in encoded):
                pools_of_file.append((text, responses[:8]))
        chosen += pools_of_file
    return chosen[:count]


Start = Callable[[], "contextlib.AbstractContextManager[str]"]


def cappy_server(folder: Path, precision: str) -> Start:
    command = [sys.executable, "-m", "serving", "--scorer", str(folder), "--model-name", "scorer"]
    return lambda: run_server([*command, "--precision", precision, "--port"], "/ready")


def naive_server(folder: Path) -> Start:
    return lambda: run_server([sys.executable, "-c", NAIVE, str(folder)], "/health")


def infinity_server(folder: Path, python: Path) -> Start:
    command = [str(python.parent / "infinity_emb"), "v2", "--model-id", str(folder), "--served-model-name", "scorer"]
    options = ["--device", "cpu", "--no-compile", "--no-bettertransformer", "--host", "127.0.0.1", "--port"]
    return lambda: run_server([*command, *options], "/health")


@contextlib.contextmanager
def run_server(command: Sequence[str], path: str) -> Iterator[str]:
    """Starts a server on a free port and yields its address once it is ready."""
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
    """Sends all pools by 32 clients: pairs per second, and request latencies in milliseconds."""
    remaining_pools = iter(pools)
    seconds: list[float] = []
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=CLIENTS)) as client:

        async def ask(text: str, pool: Sequence[str]) -> None:
            body = {"model": "scorer", "query": text, "documents": list(pool)}
            sent = time.perf_counter()
            answer = await client.post(f"{address}/rerank", json=body)
            answer.raise_for_status()
            assert len(answer.json()["results"]) == len(pool)
            seconds.append(time.perf_counter() - sent)

        async def work() -> None:
            for text, pool in remaining_pools:
                await ask(text, pool)

        await ask(*pools[0])
        seconds.clear()
        started = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(CLIENTS)))
        duration = time.perf_counter() - started
    return {
        "pairs_per_second": sum(len(pool) for _, pool in pools) / duration,
        "p50_milliseconds": median(seconds) * 1e3,
        "p99_milliseconds": quantiles(seconds, n=100)[98] * 1e3,
    }


def time_in_process(folder: Path, pools: Pools, arguments: argparse.Namespace) -> float:
    """Seconds of one call for all pairs, in a separate process."""
    path = arguments.work / "pools.json"
    path.write_text(json.dumps(pools))
    command = [sys.executable, "-c", IN_PROCESS, str(folder), str(path), arguments.precision]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return float(process.stdout.split()[-1])


def time_one_pair(folder: Path, scorer: Scorer, pools: Pools, precision: str) -> dict[str, Any]:
    """Median milliseconds of one short pair by the service and by the forward pass, in alternating blocks of 40."""
    pair = min(
        ((text, pool[0]) for text, pool in pools),
        key=lambda candidate: abs(len(candidate[0]) + len(candidate[1]) - 200),
    )
    encoded = scorer.encoder.encode([pair])
    served: list[float] = []
    bare: list[float] = []
    with cappy_server(folder, precision)() as address, httpx.Client() as client:
        for _ in range(5):
            for _ in range(40):
                sent = time.perf_counter()
                client.post(f"{address}/score", json={"pairs": [pair]}).raise_for_status()
                served.append(time.perf_counter() - sent)
            for _ in range(40):
                sent = time.perf_counter()
                scorer.infer_logits(encoded)
                bare.append(time.perf_counter() - sent)
            time.sleep(0.5)  # Threads spin for a while after their work and would slow down the other process.
    return {
        "tokens": len(encoded[0].ids),
        "served_p50_milliseconds": median(served) * 1e3,
        "forward_p50_milliseconds": median(bare) * 1e3,
        "added_milliseconds": (median(served) - median(bare)) * 1e3,
    }


if __name__ == "__main__":
    main()
