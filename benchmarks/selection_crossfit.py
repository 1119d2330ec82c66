"""Cross-fitted selection: the fitted selector against its own features, over all instances of a set.

    python benchmarks/selection_crossfit.py [--sets qwen05_small commongen e2e_nlg] [--seeds 0 1 2 3 4]

A run is a set of `shared/data/candidates` (or a JSON Lines file of the same form) and a seed, of the folds and of
training. The built-in scorer is finetuned once per fold with `cappy adapt`'s defaults (e2e_nlg: one pass), and every
instance is tested by a scorer and a selector that were fitted on other folds. "best single" is the best of score, MBR,
likelihood and greedy response on the other folds: what a user would choose who tries each. `SEEDS` limits the seeds of
a set. A finished run is a file in `benchmarks/results/selection-crossfit/`, with the label of each pick, and is not
repeated.

`benchmarks/results/selection-crossfit.json` has the means and the paired differences over all seeds, x 100 with 95 %
intervals (over instances, each of which is tested once per seed).
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine
from selection import CANDIDATES, ROOT, SETS, progress, times_100

from cappy.annotation.step import AnnotationConfig
from cappy.annotation.step import run as annotation
from cappy.evaluation.crossfit import CrossFitting, evaluate_folds
from cappy.evaluation.protocol import EvaluatedSplit
from cappy.evaluation.statistics import compare, estimate_means
from cappy.preparation.step import PreparationConfig
from cappy.preparation.step import run as preparation
from cappy.records import read
from cappy.scoring import Scorer
from cappy.selection import fitting
from cappy.selection.linear import Feature, features_of
from cappy.selection.pools import Pool, pick_label

FOLDS = 5
SEEDS = {"commongen": 5, "e2e_nlg": 3}
EPOCHS = {"e2e_nlg": 1.0}
"""Passes over the training responses; default: 4. A pass over e2e_nlg is 21,000 responses a fold."""
KNOWN: Mapping[str, tuple[Feature, ...]] = {
    "selector": ("score", "mbr", "likelihood", "greedy"),
    "selector_no_likelihood": ("score", "mbr", "greedy"),
    "selector_texts": ("score", "mbr"),
}
"""Selector -> the features that its caller may know."""
SINGLE = ("random", "best_system", "greedy", "likelihood_sum", "likelihood_mean", "mbr", "scorer", "oracle")


def main() -> None:
    """Runs what is missing and writes the tables of all runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=["qwen05_small", "commongen", "e2e_nlg"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--work", type=Path, default=Path(".cappy/benchmarks/selection-crossfit"))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    arguments = parser.parse_args()
    finished = arguments.results / "selection-crossfit"
    finished.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        for name in arguments.sets:
            path = finished / f"{Path(name).stem}-{seed}.json"
            if seed < SEEDS.get(name, 5) and not path.exists():
                print(f"{name}, seed {seed}", flush=True)
                run = measure(name, seed, arguments.work / Path(name).stem / str(seed))
                path.write_text(json.dumps(run) + "\n")
                means = (f"{key} {100 * np.mean(labels):.1f}" for key, labels in run["picks"].items())
                print(f"  {', '.join(means)}", flush=True)
    runs = [json.loads(path.read_text()) for path in sorted(finished.glob("*.json"))]
    tables = {name: table([run for run in runs if run["set"] == name]) for name in sorted({run["set"] for run in runs})}
    result = {"benchmark": "selection-crossfit", "folds": FOLDS, "tables": tables}
    (arguments.results / "selection-crossfit.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(tables, indent=1))


def measure(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """One run: the label of every selector's pick for each instance, tested by scorers of other folds."""
    source, work = Path(name), folder / "work"
    if name in SETS or source.suffix == "":
        source = CANDIDATES / f"{name}.jsonl.gz"
    exclude = SETS.get(name, ())
    preparation(PreparationConfig(source=str(source), target=folder / "prepared", exclude=exclude, work=work))
    annotation(AnnotationConfig(source=folder / "prepared", target=folder / "annotated", work=work))
    settings: dict[str, Any] = {"scorer": "builtin:tiny", "seed": seed, "epochs": EPOCHS.get(name, 4.0)}
    cross_fitting = CrossFitting(folds=FOLDS, seed=seed, metric="rougeL", with_probes=False, work=work)
    (folder / "folds").mkdir(exist_ok=True)
    splits, _ = evaluate_folds(
        cross_fitting,
        list(read(folder / "annotated")),
        ("finetuning", settings),
        folder / "folds",
        load=lambda path: Scorer.load(path, precision="fp32"),
        progress=progress,
    )
    pools = [pool for split in splits for pool in split.pools]
    picks = {
        key: [
            pick_label(value, pool.labels)
            for split in splits
            for pool, value in zip(split.pools, split.selection.values[key], strict=True)
        ]
        for key in (*SINGLE, *KNOWN)
        if all(key in split.selection.values for split in splits)
    }
    for key, features in KNOWN.items():
        if key in picks:
            picks[f"best single for {key}"] = [
                label for split in splits for label in best_single(split, splits, features)
            ]
    return {
        "set": Path(name).stem,
        "seed": seed,
        "date": date.today().isoformat(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "rules": [[rule.text for rule in split.selector.rules] for split in splits],
        "instances": [pool.instance.instance_id for pool in pools],
        "picks": {key: [round(label, 4) for label in labels] for key, labels in picks.items()},
    }


def best_single(split: EvaluatedSplit, splits: Sequence[EvaluatedSplit], features: Sequence[Feature]) -> list[float]:
    """The labels of the picks by the single feature that is best on the other folds, of those that are known there."""
    others = [pool for other in splits if other is not split for pool in other.pools]

    def known(pool: Pool) -> set[Feature]:
        return set(features_of(pool, split.selector.decoding).available)

    names = tuple(name for name in features if all(name in known(pool) for pool in (*others, *split.pools)))

    def example(pool: Pool) -> fitting.Example:
        return fitting.Example(features_of(pool, split.selector.decoding).matrix(names), pool.labels)

    weights = fitting.best_single([example(pool) for pool in others], len(names))
    return [pick_label(example(pool).features @ weights, pool.labels) for pool in split.pools]


def table(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means and paired differences of a set over its seeds, x 100, with intervals."""
    names = [name for name in runs[0]["picks"] if all(name in run["picks"] for run in runs)]
    values = {name: np.array([label for run in runs for label in run["picks"][name]]) for name in names}
    groups = [instance for run in runs for instance in run["instances"]]
    means = dict(zip(names, estimate_means(np.stack(list(values.values()), axis=1), groups), strict=True))
    pairs = [
        (key, other) for key in KNOWN if key in names for other in ("mbr", "greedy", "scorer", f"best single for {key}")
    ]
    return {
        "instances": len(runs[0]["instances"]),
        "seeds": [run["seed"] for run in runs],
        "dates": sorted({run["date"] for run in runs}),
        "machines": sorted({f"{run['machine']}, {run['threads']} threads" for run in runs}),
        "rules": [run["rules"][0] for run in runs],
        "selectors": {name: times_100(estimate) for name, estimate in means.items()},
        "comparisons": {
            f"{first}-{second}": times_100(compare(values[first], values[second], groups))
            for first, second in pairs
            if second in values
        },
    }


if __name__ == "__main__":
    main()
