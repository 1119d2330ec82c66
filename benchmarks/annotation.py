"""Speed of Rouge-L labels, compared with the reference and with a naive implementation; and how the step scales.

    python benchmarks/annotation.py [--every-pair] [--skip-step]

Reads the outputs of real systems under `shared/data/candidates` (or `--candidates FOLDER`); the first table uses one
core. Ours reads columns of the Parquet file. The others label a sample of the same candidates and must give exactly the
same numbers; `--every-pair` compares every candidate with the reference (minutes). Then the whole step runs on
generated folders of 1 and 4 million candidates: rows per second, speed with two workers, and peak memory. Results are
written to `benchmarks/results/` as JSON with date and machine.
"""

import argparse
import gzip
import json
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from functools import cache
from pathlib import Path
from typing import TypeVar

from machine import machine
from nltk.stem.porter import PorterStemmer
from rapidfuzz.distance import LCSseq
from rouge_score.rouge_scorer import RougeScorer

from cappy.annotation import rouge
from cappy.annotation.rouge import COLUMNS, rouge_l_batch, rouge_l_pools
from cappy.records import Candidate, Instance, read_batches, write

ROOT = Path(__file__).resolve().parents[1]
CANDIDATES = ROOT.parent / "shared/data/candidates"
SAMPLE = 250
"""Candidates of each set that the other implementations label."""
LONG_TOKENS = 50_000
STEP = """
import sys
from pathlib import Path
from typing import TypeVar
from cappy.annotation.step import AnnotationConfig, run
if __name__ == "__main__":
    source, target, workers = sys.argv[1:]
    folder = Path(target)
    run(AnnotationConfig(source=Path(source), target=folder / "out", work=folder / "work", workers=int(workers)))
"""

_REFERENCE = RougeScorer(["rougeL"], use_stemmer=True)
_STEMMER = PorterStemmer()
T = TypeVar("T")
Pools = list[tuple[list[str], list[str]]]


def main() -> None:
    """Measures and writes both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=Path, default=CANDIDATES, help="folder of JSON Lines files, gzipped")
    parser.add_argument("--every-pair", action="store_true", help="compare every candidate with the reference")
    parser.add_argument("--skip-step", action="store_true", help="leave out the folders of 1 and 4 million candidates")
    parser.add_argument("--work", type=Path, default=Path(".cappy/benchmarks/annotation"))
    arguments = parser.parse_args()
    sets = {path.name.partition(".")[0]: read_pools(path) for path in sorted(arguments.candidates.glob("*.jsonl.gz"))}
    result: dict[str, object] = {"benchmark": "annotation", "date": date.today().isoformat(), "machine": machine()}
    result["pools"] = compare(sets, arguments.work)
    if arguments.every_pair:
        result["pairs_equal_to_the_reference"] = sum(count_equal(pools) for pools in sets.values())
    result["longest"] = longest()
    if not arguments.skip_step:
        result["step"] = step([pool for pools in sets.values() for pool in pools], arguments.work)
    target = ROOT / "benchmarks/results/annotation.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def compare(sets: dict[str, Pools], work: Path) -> dict[str, object]:
    """Microseconds per candidate of the three implementations, for each set and overall."""
    table: dict[str, dict[str, float]] = {}
    for name, pools in sets.items():
        folder = work / name
        if not (folder / "manifest.json").exists():
            write(folder, instances(pools, len(pools)))
        sample = draw_pools(pools)
        seconds, values = time_call(lambda: label_columns(folder))  # noqa: B023
        obvious, same = time_call(lambda: naive_labels(pools))  # noqa: B023
        assert values == same
        reference, expected = time_call(lambda: [score(reference_label, *pool) for pool in sample])  # noqa: B023
        assert expected == [score(rouge.rouge_l, *pool) for pool in sample]
        count, sample_size = sum(map(len, values)), sum(len(responses) for _, responses in sample)
        table[name] = {
            "candidates": count,
            "ours_us": 1e6 * seconds / count,
            "obvious_us": 1e6 * obvious / count,
            "rouge_score_us": 1e6 * reference / sample_size,
        }
        print(f"{name:20s} {table[name]}", flush=True)
    total = {
        column: sum(row["candidates"] * row[column] for row in table.values()) for column in next(iter(table.values()))
    }
    return {
        "sets": table,
        "times_rouge_score": total["rouge_score_us"] / total["ours_us"],
        "times_obvious": total["obvious_us"] / total["ours_us"],
    }


def label_columns(folder: Path) -> list[list[float]]:
    """Labels of a folder, read as columns, with empty caches."""
    rouge._porter_stem.cache_clear()
    return [labels for batch in read_batches(folder, columns=COLUMNS) for labels in rouge_l_batch(batch).to_pylist()]


def naive_labels(pools: Pools) -> list[list[float]]:
    """Labels of all pools by the naive implementation, with empty caches."""
    _stem.cache_clear()
    return [score(naive_label, *pool) for pool in pools]


def naive_label(references: Sequence[str], response: str) -> float:
    """A naive fast implementation: a regular expression, a cached stemmer, rapidfuzz, one pair at a time."""
    best = 0.0
    tokens = naive_tokens(response)
    for reference in references:
        target = naive_tokens(reference)
        common = LCSseq.similarity(target, tokens)
        if common:
            precision, recall = common / len(tokens), common / len(target)
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def naive_tokens(text: str) -> list[str]:
    """The stemmed words of a text."""
    return [_stem(word) if len(word) > 3 else word for word in re.findall(r"[a-z0-9]+", text.lower())]


@cache
def _stem(word: str) -> str:
    return str(_STEMMER.stem(word))


def reference_label(references: Sequence[str], response: str) -> float:
    return float(_REFERENCE.score_multi(references, response)["rougeL"].fmeasure)


def score(label: Callable[[Sequence[str], str], float], references: list[str], responses: list[str]) -> list[float]:
    """Labels of a pool, one response at a time."""
    return [label(references, response) for response in responses]


def count_equal(pools: Pools) -> int:
    """Asserts that every candidate has the reference's label; returns the number of candidates."""
    ours = iter(rouge_l_pools([first for first, _ in pools], [second for _, second in pools]).tolist())
    for references, responses in pools:
        for response in responses:
            assert next(ours) == reference_label(references, response), (references, response)
    return sum(len(responses) for _, responses in pools)


def longest() -> dict[str, float]:
    """Two random texts of 50,000 words: seconds, and the growth of peak memory."""
    rng = random.Random(0)
    reference, response = (" ".join(f"word{rng.randrange(20_000)}" for _ in range(LONG_TOKENS)) for _ in range(2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, _ = time_call(lambda: rouge_l_pools([[reference]], [[response]]))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"tokens": LONG_TOKENS, "seconds": seconds, "memory_grew_mb": (after - before) / 1024}


def step(pools: Pools, work: Path) -> dict[str, object]:
    """The whole step on 1 and 4 million candidates with one worker, and on 1 million with two."""
    measured: dict[str, object] = {}
    for millions, workers in ((1, 1), (1, 2), (4, 1)):
        source = work / f"source-{millions}m"
        if not (source / "manifest.json").exists():
            write(source, instances(pools, 0, candidates=millions * 1_000_000))
        target = work / f"target-{millions}m-{workers}"
        subprocess.run(["rm", "-rf", target], check=True)
        before = time.perf_counter()
        with subprocess.Popen([sys.executable, "-c", STEP, source, target, str(workers)]) as process:
            peak = watch_memory(process)
        seconds = time.perf_counter() - before
        rows = json.loads((source / "manifest.json").read_text())["candidates"]
        measured[f"{millions}M candidates, {workers} worker(s)"] = {
            "seconds": seconds,
            "candidates_per_second": rows / seconds,
            "peak_mb": peak,
            "core_hours_for_160M": 160e6 / (rows / seconds) / 3600 * workers,
        }
        print(measured, flush=True)
    return measured


def watch_memory(process: "subprocess.Popen[bytes]") -> float:
    """Peak MB of a process and its children together, sampled ten times a second."""
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(_resident(pid) for pid in [process.pid, *_children(process.pid)]))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(process.returncode)
    return peak / 1024


def instances(pools: Pools, count: int, *, candidates: int = 0) -> Iterator[Instance]:
    """`count` instances, or as many as hold `candidates`, from the pools in turn."""
    number = num_candidates = 0
    while number < count or num_candidates < candidates:
        references, responses = pools[number % len(pools)]
        number, num_candidates = number + 1, num_candidates + len(responses)
        yield Instance(
            instance_id=str(number),
            instruction=f"instruction {number}",
            references=tuple(references),
            candidates=tuple(Candidate(response=response, generator="system") for response in responses),
        )


def draw_pools(pools: Pools) -> Pools:
    """Pools in random order (seeded) until there are `SAMPLE` candidates; large pools are subsampled."""
    rng = random.Random(0)
    chosen, num_candidates = [], 0
    for references, responses in rng.sample(pools, len(pools)):
        sample = rng.sample(responses, min(len(responses), max(8, SAMPLE // 20)))
        chosen.append((references, sample))
        num_candidates += len(sample)
        if num_candidates >= SAMPLE:
            break
    return chosen


def read_pools(path: Path) -> Pools:
    """References and responses of each row of a file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [(row["references"], [candidate["text"] for candidate in row["candidates"]]) for row in rows]


def time_call(function: Callable[[], T]) -> tuple[float, T]:
    """Seconds of a call, and its result."""
    started = time.perf_counter()
    value = function()
    return time.perf_counter() - started, value


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _resident(pid: int) -> int:
    try:
        match = re.search(r"^VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(match[1]) if match else 0


if __name__ == "__main__":
    main()
