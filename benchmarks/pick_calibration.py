"""Checks the calibrated labels of picks, and the precision that a threshold promises, on held-out instances.

    python benchmarks/pick_calibration.py [--sets gsm8k_openai ...] [--splits 100] [--work .cappy/benchmarks/picks]

Real candidates of `shared/data/candidates` are scored by the built-in scorer in fp32, which was not trained on them,
and by MBR, which separates them better; e2e_nlg and summeval only by MBR, since the scorer would take long on them. In
each of many random splits, 60 instances, or half of all, fit the calibration and choose thresholds, and the others test
them. "before" is the former method: one isotonic map of all candidates, and the lowest threshold with enough precision
on the fit set; "after" is `cappy.evaluation.calibration` and `cappy.evaluation.threshold`.

Scores are stored under `--work` and reused. Writes `benchmarks/results/pick-calibration.json` and prints its tables as
Markdown.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from scipy.optimize import isotonic_regression

from cappy.annotation.step import AnnotationConfig
from cappy.annotation.step import run as annotation
from cappy.evaluation import threshold
from cappy.evaluation.calibration import collect_picks, fit, measure_reliability
from cappy.preparation.step import PreparationConfig
from cappy.preparation.step import run as preparation
from cappy.records import read
from cappy.scoring import Scorer
from cappy.selection import Selector
from cappy.selection.pools import Pool, Vector, collect_pools, pick_label, score_pools, with_scores

ROOT = Path(__file__).resolve().parents[1]
CANDIDATES = ROOT.parent / "shared/data/candidates"
SETS: Mapping[str, tuple[str, Sequence[str]]] = {
    "qwen05_small": ("rougeL", ("builtin", "mbr")),
    "self_instruct_252": ("rougeL", ("builtin", "mbr")),
    "gsm8k_openai": ("numeric_match", ("builtin", "mbr")),
    "commongen": ("rougeL", ("builtin", "mbr")),
    "e2e_nlg": ("rougeL", ("mbr",)),
    "summeval": ("rougeL", ("mbr",)),
}
"""Set -> metric and scorers."""
EXCLUDED = {"e2e_nlg": ("primary/*",)}
HELD_OUT = (60, None)
"""Instances that fit the calibration; None means half of them."""
SIZES = (1, 2, 4, None)
"""Candidates from which the best is picked; None means all."""
PRECISIONS = (0.5, 0.7, 0.8, 0.9)
GOOD = 0.5
Expect = Callable[[Vector, Sequence[int]], Vector]
"""The expected labels of picks, from their scores and the numbers of distinct candidates."""


def main() -> None:
    """Measures every set and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--splits", type=int, default=100)
    parser.add_argument("--work", type=Path, default=Path(".cappy/benchmarks/picks"))
    parser.add_argument("--target", type=Path, default=ROOT / "benchmarks/results/pick-calibration.json")
    arguments = parser.parse_args()
    tables: list[dict[str, Any]] = []
    for name in arguments.sets:
        for scorer in SETS[name][1]:
            pools, scores = load(name, scorer, arguments.work)
            for held_out in HELD_OUT:
                measured = measure(pools, scores, held_out, arguments.splits)
                tables.append({"set": name, "scorer": scorer, **measured})
                print(json.dumps(tables[-1]), flush=True)
    result = {
        "benchmark": "pick-calibration",
        "date": date.today().isoformat(),
        "machine": machine(),
        "splits": arguments.splits,
        "good": GOOD,
        "tables": tables,
    }
    arguments.target.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(tables))


def load(name: str, scorer: str, work: Path) -> tuple[list[Pool], list[Vector]]:
    """The pools of a set with at least two distinct candidates, and their scores."""
    metric, folder = SETS[name][0], work / name
    source = str(CANDIDATES / f"{name}.jsonl.gz")
    if not (folder / "annotated").exists():
        work_settings: dict[str, Any] = {"work": folder / "work"}
        excluded = EXCLUDED.get(name, ())
        preparation(PreparationConfig(source=source, target=folder / "prepared", exclude=excluded, **work_settings))
        annotation(
            AnnotationConfig(source=folder / "prepared", target=folder / "annotated", metric=metric, **work_settings)
        )
    pools = collect_pools(read(folder / "annotated"), metric=metric, splits={"train", "validation", "test"})
    pools = [pool for pool in pools if len(set(pool.responses)) > 1]
    stored = folder / f"{scorer}.npz"
    if not stored.exists():
        if scorer == "mbr":
            scores = [pool.mbr for pool in pools]
        else:
            scores = score_pools(pools, Scorer.load("builtin:tiny", precision="fp32").score, lambda done: None)
        np.savez(stored, *scores)
    with np.load(stored) as arrays:
        return pools, [arrays[key] for key in arrays.files]


def measure(pools: Sequence[Pool], scores: Sequence[Vector], held_out: int | None, splits: int) -> dict[str, Any]:
    """Means over the splits, including the share of splits with too low a precision."""
    rng = np.random.default_rng(0)
    groups = sorted({pool.instance.group_id for pool in pools})
    num_held_out = held_out or len(groups) // 2
    values_by_key: dict[str, list[float]] = {}
    for _ in range(splits):
        held_out_groups = set(rng.choice(groups, num_held_out, replace=False).tolist())
        fit_indices, test_indices = (
            [i for i, p in enumerate(pools) if (p.instance.group_id in held_out_groups) == side]
            for side in (True, False)
        )
        fit_set, test_set = (([pools[i] for i in w], [scores[i] for i in w]) for w in (fit_indices, test_indices))
        for key, value in evaluate_split(fit_set, test_set, rng).items():
            values_by_key.setdefault(key, []).append(value)
    values = {
        key: round(float(np.nanmean(numbers)), 4)
        for key, numbers in values_by_key.items()
        if not np.isnan(numbers).all()
    }
    return {"held_out": num_held_out, "tested": len(groups) - num_held_out, **values}


def evaluate_split(
    fit_set: tuple[Sequence[Pool], Sequence[Vector]],
    test_set: tuple[Sequence[Pool], Sequence[Vector]],
    rng: np.random.Generator,
) -> dict[str, float]:
    """The results of one split, by the former and the present method."""
    values: dict[str, float] = {}
    maps = {"before": fit_on_all_candidates(*fit_set), "after": fit_by_size(*fit_set)}
    for size in SIZES:
        scores, labels, sizes = draw_picks(*test_set, size, rng)
        key = "all" if size is None else str(size)
        values[f"n={key} label"] = float(labels.mean())
        for name, expect in {"raw": lambda raw_scores, _: raw_scores, **maps}.items():
            expected = expect(scores, sizes)
            values[f"n={key} {name} expected"] = float(expected.mean())
            values[f"n={key} {name} ece"] = measure_reliability(expected, labels).ece
    fit_picks, test_picks = (
        collect_picks(with_scores(pools, "scorer", scores), scores) for pools, scores in (fit_set, test_set)
    )
    groups = np.array([pool.instance.group_id for pool in fit_set[0]])
    for precision in PRECISIONS:
        thresholds = {
            "before": lowest_on_fit_set(fit_picks.scores, fit_picks.labels >= GOOD, precision),
            "after": threshold.find_lowest(fit_picks.scores, fit_picks.labels >= GOOD, groups, precision),
        }
        for name, minimum in thresholds.items():
            values |= {
                f"{precision} {name} {key}": value
                for key, value in evaluate_threshold(test_picks.scores, test_picks.labels, minimum, precision)
            }
        expected = maps["after"](fit_picks.scores, fit_picks.sizes)
        floor = threshold.find_lowest(expected, fit_picks.labels >= GOOD, groups, precision)
        expected_of_test = maps["after"](test_picks.scores, test_picks.sizes)
        values |= {
            f"{precision} floor {key}": value
            for key, value in evaluate_threshold(expected_of_test, test_picks.labels, floor, precision)
        }
    return values


def evaluate_threshold(
    scores: Vector, labels: Vector, minimum: float | None, required_precision: float
) -> list[tuple[str, float]]:
    """Whether there is a threshold, its coverage and precision, and whether the precision is too low."""
    answered = scores >= (np.inf if minimum is None else minimum)
    precision = float((labels[answered] >= GOOD).mean()) if answered.any() else np.nan
    return [
        ("chosen", float(minimum is not None)),
        ("coverage", float(answered.mean())),
        ("precision", precision),
        ("broken", float(precision < required_precision)),
    ]


def draw_picks(
    pools: Sequence[Pool], scores: Sequence[Vector], size: int | None, rng: np.random.Generator
) -> tuple[Vector, Vector, list[int]]:
    """Scores and labels of the picks among `size` random candidates per pool, and how many of these are distinct."""
    rows = []
    for pool, pool_scores in zip(pools, scores, strict=True):
        num_drawn = len(pool_scores) if size is None else size
        if num_drawn <= len(pool_scores):
            drawn_indices = rng.choice(len(pool_scores), num_drawn, replace=False)
            distinct = len({pool.responses[index] for index in drawn_indices})
            rows.append(
                (
                    pool_scores[drawn_indices].max(),
                    pick_label(pool_scores[drawn_indices], pool.labels[drawn_indices]),
                    distinct,
                )
            )
    top, labels, sizes = zip(*rows, strict=True)
    return np.array(top), np.array(labels), list(sizes)


def fit_by_size(pools: Sequence[Pool], scores: Sequence[Vector]) -> Expect:
    """The present calibration."""
    calibration = fit(with_scores(pools, "scorer", scores), [Selector()] * len(pools), "label", seed=0)
    assert calibration is not None
    return lambda scores_of_picks, sizes: np.array(
        [calibration.apply([score], n=n)[0] for score, n in zip(scores_of_picks.tolist(), sizes, strict=True)]
    )


def fit_on_all_candidates(pools: Sequence[Pool], scores: Sequence[Vector]) -> Expect:
    """The former calibration: one isotonic map of all candidates."""
    values, labels = np.concatenate(scores), np.concatenate([pool.labels for pool in pools])
    points, index = np.unique(values, return_inverse=True)
    weights = np.bincount(index).astype(np.float64)
    levels = isotonic_regression(np.bincount(index, weights=labels) / weights, weights=weights)
    return lambda scores_of_picks, sizes: np.interp(scores_of_picks, points, levels.x)


def lowest_on_fit_set(scores: Vector, good: "np.ndarray[Any, np.dtype[np.bool_]]", precision: float) -> float | None:
    """The former threshold: the lowest one with enough precision on the fit set."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    share = np.cumsum(good[order]) / np.arange(1, len(order) + 1)
    last = np.append(ranked[1:] != ranked[:-1], True)
    enough = np.flatnonzero((share >= precision) & last)
    return float(ranked[enough[-1]]) if len(enough) else None


def markdown(tables: Sequence[Mapping[str, Any]]) -> str:
    """The tables of the guide."""
    lines = [
        "| set | scorer | held out | label of picks x100 | expected before | after | ECE x100 raw | before | after |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in tables:
        columns = ["label", "before expected", "after expected", "raw ece", "before ece", "after ece"]
        cells = [f"{100 * row[f'n=all {key}']:.1f}" for key in columns]
        lines.append(f"| {row['set']} | {row['scorer']} | {row['held_out']} | {' | '.join(cells)} |")
    lines += [
        "",
        "| set | scorer | held out | wanted | before: kept | broken | answered | after: kept | broken | answered |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in tables:
        for precision in PRECISIONS:
            cells = []
            for name in ("before", "after"):
                for key in ("precision", "broken", "coverage"):
                    value = row.get(f"{precision} {name} {key}")
                    cells.append("" if value is None else f"{100 * value:.0f}")
            head = f"| {row['set']} | {row['scorer']} | {row['held_out']}"
            lines.append(f"{head} | {100 * precision:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
