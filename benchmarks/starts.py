"""Which start adapts best: scorers and encoders finetuned on the same instances of a set, tested on the same others.

    python benchmarks/starts.py --starts builtin FOLDER ... [--sets commongen ...] [--instances 64 0] [--seeds 0 1 2]

A run is a set of `shared/data/candidates` (or a file of the same form), a start, a number of training instances (0 is
all) and a seed, which splits the instances 70/10/20. A start is finetuned with `cappy adapt`'s defaults and tested on
at most `MAX_TEST` instances, by its score alone. The start before finetuning is tested too, if it has a head.

A finished run is a file in `benchmarks/results/starts/`, with the label of each pick, and is not repeated.
`benchmarks/results/starts.json` has means over all seeds and paired differences between the starts, x 100 with 95 %
intervals (over instances).
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine
from selection import CANDIDATES, ROOT, SETS, progress, take_instances, times_100

from cappy.annotation.step import AnnotationConfig
from cappy.annotation.step import run as annotation
from cappy.evaluation.statistics import compare, estimate_means
from cappy.preparation.step import PreparationConfig
from cappy.preparation.step import run as preparation
from cappy.records import Instance, read
from cappy.scorers import open_scorer
from cappy.scoring import Scorer
from cappy.scoring.model import is_encoder
from cappy.selection.pools import Pool, collect_pools, pick_label, score_pools
from cappy.training.finetuning import FinetuningConfig
from cappy.training.finetuning import run as finetuning

DEFAULT_SETS = ("commongen", "e2e_nlg", "qwen05_small", "self_instruct_252", "sfhot", "sfres")
MAX_TEST = 200
Run = Mapping[str, Any]


def main() -> None:
    """Runs what is missing and writes the tables of all runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", nargs="+", default=["builtin"], help="builtin, or folders of scorers or encoders")
    parser.add_argument("--sets", nargs="+", default=list(DEFAULT_SETS))
    parser.add_argument("--instances", nargs="+", type=int, default=[64], help="training instances; 0: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--work", type=Path, default=Path(".cappy/benchmarks/starts"))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    arguments = parser.parse_args()
    finished = arguments.results / "starts"
    finished.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        for name in arguments.sets:
            for count in arguments.instances:
                for start in arguments.starts:
                    path = finished / f"{Path(name).name.split('.')[0]}-{count}-{start_name(start)}-{seed}.json"
                    if not path.exists():
                        print(path.stem, flush=True)
                        run = measure(name, count, start, seed, arguments.work)
                        path.write_text(json.dumps(run) + "\n")
                        print(f"  {summarize(run)}", flush=True)
    runs = [json.loads(path.read_text()) for path in sorted(finished.glob("*.json"))]
    result = {"benchmark": "starts", "tables": tables(runs)}
    (arguments.results / "starts.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["tables"], indent=1))


def measure(name: str, count: int, start: str, seed: int, work: Path) -> dict[str, Any]:
    """One run: the label of the pick for each test instance, before and after finetuning, and of MBR."""
    source = Path(name) if Path(name).suffix else CANDIDATES / f"{name}.jsonl.gz"
    folder = work / source.name.split(".")[0] / str(seed)
    annotated = annotate(source, SETS.get(source.name.split(".")[0], ()), seed, folder)
    training = annotated
    if count:
        training, _ = take_instances(annotated, count, folder / f"{count} instances", 10**9, seed)
    own = folder / f"{count} {start_name(start)}"
    started = time.monotonic()
    manifest = finetuning(
        FinetuningConfig(scorer=start, source=training, target=own / "scorer", seed=seed, work=own / "work"), progress
    )
    seconds = time.monotonic() - started
    pools = collect_pools(islice(_test_instances(annotated), MAX_TEST), metric="rougeL", splits={"test"})
    values = {
        "after": score_pools(pools, Scorer.load(str(own / "scorer"), precision="fp32").score, lambda done: None),
        "mbr": [pool.mbr for pool in pools],
        "oracle": [pool.labels for pool in pools],
    }
    scorer = open_scorer(start)
    if not is_encoder(scorer, scorer.config()):
        values["before"] = score_pools(pools, Scorer.load(start, precision="fp32").score, lambda done: None)
    picks = {key: _pick_labels(pools, each) for key, each in values.items()}
    return {
        "set": source.name.split(".")[0],
        "train_instances": count,
        "start": start_name(start),
        "seed": seed,
        "date": date.today().isoformat(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "training_seconds": round(seconds),
        "training": dict(manifest.metrics),
        "instances": [pool.instance.instance_id for pool in pools],
        "picks": {**picks, "random": [round(float(pool.labels.mean()), 4) for pool in pools]},
    }


def start_name(start: str) -> str:
    """The name of a start: that of its folder and the beginning of the hash of its files."""
    return f"{Path(start).name}-{open_scorer(start).hash[:8]}"


def annotate(source: Path, exclude: Sequence[str], seed: int, folder: Path) -> Path:
    """The annotated instances of a set, split by instance."""
    work = folder / "work"
    config = PreparationConfig(
        source=str(source), target=folder / "prepared", exclude=tuple(exclude), seed=seed, work=work
    )
    preparation(config)
    annotation(AnnotationConfig(source=folder / "prepared", target=folder / "annotated", seed=seed, work=work))
    return folder / "annotated"


def _test_instances(annotated: Path) -> Iterator[Instance]:
    return (instance for instance in read(annotated) if instance.split == "test")


def _pick_labels(pools: Sequence[Pool], values: Sequence[Any]) -> list[float]:
    return [round(pick_label(value, pool.labels), 4) for pool, value in zip(pools, values, strict=True)]


def tables(runs: Sequence[Run]) -> dict[str, Any]:
    """Set and number of training instances -> means of each start and differences between starts, over their seeds."""
    result = {}
    for name, count in sorted({(run["set"], run["train_instances"]) for run in runs}):
        of_set = [run for run in runs if (run["set"], run["train_instances"]) == (name, count)]
        starts = sorted({run["start"] for run in of_set})
        by_start = {start: {run["seed"]: run for run in of_set if run["start"] == start} for start in starts}
        result[f"{name}, {count or 'all'} instances"] = {
            "starts": {start: start_table(list(by_start[start].values())) for start in starts},
            "differences": {
                f"{second}-{first}": difference(by_start[first], by_start[second])
                for first, second in combinations(starts, 2)
                if by_start[first].keys() & by_start[second].keys()
            },
        }
    return result


def start_table(runs: Sequence[Run]) -> dict[str, Any]:
    """Means of one start over its seeds, and what finetuning gained over it and over MBR."""
    names = [name for name in ("random", "mbr", "before", "after", "oracle") if name in runs[0]["picks"]]
    picks = {name: np.array([label for run in runs for label in run["picks"][name]]) for name in names}
    groups = [instance for run in runs for instance in run["instances"]]
    means = estimate_means(np.stack(list(picks.values()), axis=1), groups)
    return {
        "seeds": [run["seed"] for run in runs],
        "dates": sorted({run["date"] for run in runs}),
        "machines": sorted({f"{run['machine']}, {run['threads']} threads" for run in runs}),
        "training_seconds": [run["training_seconds"] for run in runs],
        "means": {name: times_100(mean) for name, mean in zip(picks, means, strict=True)},
        "comparisons": {
            f"after-{name}": times_100(compare(picks["after"], picks[name], groups))
            for name in ("mbr", "before")
            if name in picks
        },
    }


def difference(first: Mapping[int, Run], second: Mapping[int, Run]) -> dict[str, Any]:
    """The second start's picks after finetuning minus the first's, over the seeds that both have."""
    seeds = sorted(first.keys() & second.keys())
    if any(first[seed]["instances"] != second[seed]["instances"] for seed in seeds):
        raise SystemExit("benchmarks/starts.py: the starts were tested on different instances; delete the older runs")
    labels = [np.array([x for seed in seeds for x in runs[seed]["picks"]["after"]]) for runs in (second, first)]
    groups = [instance for seed in seeds for instance in first[seed]["instances"]]
    return {"seeds": seeds, **times_100(compare(labels[0], labels[1], groups))}


def summarize(run: Run) -> str:
    means = (f"{name} {100 * np.mean(labels):.1f}" for name, labels in run["picks"].items())
    return f"{', '.join(means)}; {run['training_seconds']} s"


if __name__ == "__main__":
    main()
