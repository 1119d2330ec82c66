"""Scoring speed, compared with other libraries that load the same folder, and the agreement of bf16 with fp32.

    python benchmarks/scoring.py [--sizes base large] [--per-set 64] [--rounds 3] [--device cpu]
        [--peers-python PYTHON]

Models have RoBERTa's base and large shapes with random weights and RoBERTa's vocabulary. Pairs are real ones from every
set of `shared/data/candidates`, without duplicates, so that lengths are real and caching does not help. Every round
runs all of them in turn, and the best round of each counts, in wall-clock and CPU seconds; CPU seconds depend less on
other work on the machine. The machine's matrix product rate is measured in the same run at the same precision, over 64
products in a row, since a single one may run at a higher clock rate; our share of it counts the operations of the
linear layers for real tokens, without padding.

`--peers-python` is the Python of another environment (benchmarks/requirements-scoring-peers.txt) in which CrossEncoder
runs on ONNX Runtime and OpenVINO. The agreement of bf16 with fp32 is measured with `--trained` (a scorer folder, or
builtin) on whole pools. Results are written to `benchmarks/results/scoring.json` with date and machine.
"""

import argparse
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from machine import machine
from scoring_data import SHAPES, Pairs, candidate_files, read_pools, real_pairs, scorer_folder
from sentence_transformers import CrossEncoder
from torch.nn.functional import linear
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cappy.scoring import Scorer
from cappy.scoring.model import has_bf16

ROOT = Path(__file__).resolve().parents[1]
PRODUCT_ROWS = 2048
PRODUCTS = 64
FOREIGN = """
import json, sys, time
from sentence_transformers import CrossEncoder
folder, pairs, backend, rounds, threads = sys.argv[1:]
pairs = [tuple(pair) for pair in json.load(open(pairs))]
if backend == "onnx":
    from onnxruntime import SessionOptions
    options = SessionOptions()
    options.intra_op_num_threads = int(threads)
    settings = {"session_options": options, "provider": "CPUExecutionProvider"}
else:
    settings = {"ov_config": {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}}
model = CrossEncoder(folder, device="cpu", backend=backend, model_kwargs={"export": True, **settings})
model.predict(pairs[:8])
best = [1e9, 1e9]
for _ in range(int(rounds)):
    clock, processor = time.perf_counter(), time.process_time()
    scores = model.predict(pairs)
    best = [min(best[0], time.perf_counter() - clock), min(best[1], time.process_time() - processor)]
print(json.dumps({"seconds": best[0], "cpu_seconds": best[1], "scores": scores.tolist()}))
"""


@dataclass
class Best:
    """The times of the best round so far, and the scores."""

    seconds: float = float("inf")
    cpu_seconds: float = float("inf")
    scores: Sequence[float] = ()

    def add(self, work: Callable[[], Sequence[float]]) -> None:
        """Runs one round."""
        clock, processor = time.perf_counter(), time.process_time()
        self.scores = work()
        self.seconds = min(self.seconds, time.perf_counter() - clock)
        self.cpu_seconds = min(self.cpu_seconds, time.process_time() - processor)


def main() -> None:
    """Measures and writes all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--per-set", type=int, default=64, help="distinct pairs of each set of candidates")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="threads of torch", default=torch.get_num_threads())
    parser.add_argument("--peers-python", type=Path, help="Python with ONNX Runtime and OpenVINO")
    parser.add_argument("--trained", default="builtin", help="scorer for the agreement of bf16 with fp32")
    parser.add_argument("--pools", type=int, default=20, help="pools of each set for the agreement")
    parser.add_argument("--work", type=Path, default=Path(".cappy/benchmarks/scoring"))
    parser.add_argument("--target", type=Path, default=ROOT / "benchmarks/results/scoring.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bf16 = has_bf16(torch.device(arguments.device))
    result: dict[str, Any] = {
        "benchmark": "scoring",
        "date": date.today().isoformat(),
        "machine": machine(),
        "threads": arguments.threads,
        "bf16": "has instructions for it" if bf16 else "has no instructions for it: speed in bf16 was not measured",
    }
    for size in arguments.sizes:
        folder = scorer_folder(size, arguments.work)
        result[size] = speed(folder, size, arguments, bf16)
        print(json.dumps({size: result[size]}, indent=1), flush=True)
        arguments.target.write_text(json.dumps(result, indent=1) + "\n")
    result["agreement_of_bf16"] = agreement(arguments.trained, arguments.pools, arguments.device)
    arguments.target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def speed(folder: Path, size: str, arguments: argparse.Namespace, bf16: bool) -> dict[str, Any]:
    """The results of one shape: time, speed relative to CrossEncoder and largest difference of every implementation."""
    device = arguments.device
    ours = Scorer.load(str(folder), device=device, precision="fp32")
    pairs = real_pairs(ours, arguments.per_set)
    lengths = [len(pair.ids) for pair in ours.encoder.encode(pairs)]
    peer = CrossEncoder(str(folder), device=device)
    ways: dict[str, Callable[[], Sequence[float]]] = {
        "CrossEncoder": lambda: peer.predict(pairs).tolist(),
        "transformers, batches of 32": in_turn(folder, pairs, device),
        "cappy fp32": lambda: ours.score(pairs),
    }
    if bf16:
        ours_bf16 = Scorer.load(str(folder), device=device, precision="bf16")
        peer_bf16 = CrossEncoder(str(folder), device=device, model_kwargs={"dtype": torch.bfloat16})
        ways |= {
            "cappy auto (bf16)": lambda: ours_bf16.score(pairs),
            "CrossEncoder bf16": lambda: peer_bf16.predict(pairs).tolist(),
        }
    results = {name: Best() for name in ways}
    rates = {dtype: Best() for dtype in (torch.float32, torch.bfloat16)[: 1 + bf16]}
    for name, way in ways.items():
        results[name].add(lambda: way()[:1]) if device == "cuda" else None  # noqa: B023
    for _ in range(arguments.rounds):
        for dtype, rate in rates.items():
            product = matrix_product(size, dtype, device)
            for _ in range(3):
                rate.add(product)
        for name, way in ways.items():
            results[name].add(way)
    if arguments.peers_python:
        results |= {
            f"CrossEncoder {backend}": foreign(folder, pairs, backend, arguments) for backend in ("onnx", "openvino")
        }
    rows = {name: row(best, results["CrossEncoder"], len(pairs), sum(lengths)) for name, best in results.items()}
    for name, dtype in (("cappy fp32", torch.float32), ("cappy auto (bf16)", torch.bfloat16)):
        if name in rows:
            share = work_done(lengths, size) / product_work(size)
            rows[name]["share_of_matrix_rate"] = share * rates[dtype].seconds / results[name].seconds
            rows[name]["share_of_matrix_rate_cpu"] = share * rates[dtype].cpu_seconds / results[name].cpu_seconds
    return {
        "pairs": len(pairs),
        "tokens": sum(lengths),
        "longest": max(lengths),
        "matrix_rate_gflops": {str(dtype): product_work(size) / rate.seconds / 1e9 for dtype, rate in rates.items()},
        "ways": rows,
    }


def row(best: Best, peer: Best, pairs: int, tokens: int) -> dict[str, float]:
    differences = [abs(ours - theirs) for ours, theirs in zip(best.scores, peer.scores, strict=True)]
    return {
        "seconds": best.seconds,
        "cpu_seconds": best.cpu_seconds,
        "pairs_per_second": pairs / best.seconds,
        "tokens_per_second": tokens / best.seconds,
        "times_cross_encoder": peer.seconds / best.seconds,
        "times_cross_encoder_cpu": peer.cpu_seconds / best.cpu_seconds,
        "largest_difference": max(differences),
    }


def in_turn(folder: Path, pairs: Pairs, device: str) -> Callable[[], list[float]]:
    """A naive loop with transformers: batches of 32 in the order of the pairs."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=False).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    @torch.inference_mode()
    def run() -> list[float]:
        scores: list[float] = []
        for start in range(0, len(pairs), 32):
            instructions, responses = zip(*pairs[start : start + 32], strict=True)
            inputs = tokenizer(list(instructions), list(responses), padding=True, truncation=True, return_tensors="pt")
            scores += model(**inputs.to(device)).logits.sigmoid().squeeze(-1).tolist()
        return scores

    return run


def foreign(folder: Path, pairs: Pairs, backend: str, arguments: argparse.Namespace) -> Best:
    """CrossEncoder on another back end, in another environment, with the same number of threads."""
    pairs_file = arguments.work / "pairs.json"
    pairs_file.write_text(json.dumps(pairs))
    counts = [str(arguments.rounds), str(arguments.threads)]
    command = [arguments.peers_python, "-c", FOREIGN, folder.resolve(), pairs_file, backend, *counts]
    environment = {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    values = json.loads(process.stdout.splitlines()[-1])
    return Best(seconds=values["seconds"], cpu_seconds=values["cpu_seconds"], scores=values["scores"])


def matrix_product(size: str, dtype: torch.dtype, device: str) -> Callable[[], Sequence[float]]:
    """Repeated products of a batch with the largest matrix of a layer."""
    hidden = SHAPES[size][0]
    rows = torch.randn(PRODUCT_ROWS, hidden, dtype=dtype, device=device)
    weight = torch.randn(4 * hidden, hidden, dtype=dtype, device=device)

    def run() -> Sequence[float]:
        for _ in range(PRODUCTS):
            linear(rows, weight)
        if device == "cuda":
            torch.cuda.synchronize()
        return ()

    return run


def product_work(size: str) -> int:
    """The number of operations of `matrix_product`."""
    return PRODUCTS * 2 * PRODUCT_ROWS * 4 * SHAPES[size][0] ** 2


def work_done(lengths: Sequence[int], size: str) -> float:
    """Operations of the linear layers; in the last layer all but the first token need only keys and values."""
    hidden, layers, _ = SHAPES[size]
    square, tokens = 2 * hidden**2, sum(lengths)
    return square * (12 * (layers - 1) * tokens + 2 * tokens + 10 * len(lengths))


def agreement(trained: str, count: int, device: str) -> dict[str, Any]:
    """The share of pools with the same pick in bf16 and fp32, and the differences of the scores."""
    pools = [pool for path in candidate_files() for pool in read_pools(path)[:count]]
    fp32, bf16 = (Scorer.load(trained, device=device, precision=precision) for precision in ("fp32", "bf16"))
    same, regrets, differences = 0, [], []
    for exact, rounded in zip(fp32.select_stream(pools), bf16.select_stream(pools), strict=True):
        same += exact.response == rounded.response
        regrets.append(max(exact.scores) - exact.scores[rounded.index])
        differences += [abs(a - b) for a, b in zip(exact.scores, rounded.scores, strict=True)]
    return {
        "scorer": trained if trained == "builtin" else "a folder",
        "pools": len(pools),
        "same_pick": same / len(pools),
        "largest_loss_by_another_pick": max(regrets),
        "mean_difference": fmean(differences),
        "largest_difference": max(differences),
    }


if __name__ == "__main__":
    main()
