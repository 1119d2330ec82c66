"""Is what a calibration expects of a pick true, and does a threshold keep the precision that it promises?

    python benchmarks/pick_calibration.py [--sets gsm8k_openai ...] [--splits 100] [--work .cappy/benchmarks/picks]

Real candidates of `shared/data/candidates`, scored by the built-in scorer in fp32, which was trained on none of them
(but not e2e_nlg and summeval, which take it long), and by MBR's value, which tells more of them apart. Many times over
60 random instances, or half of them, calibrate and choose thresholds, and the others are tested. "before" is the former
method: one isotonic map of all candidates, and the lowest threshold whose held-out picks happen to be good enough;
"after" is `cappy.evaluation.calibration` and `cappy.evaluation.threshold`.

Scores lie under `--work` and are not computed again. Writes `benchmarks/results/pick-calibration.json` and prints its
tables as Markdown.
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
from cappy.selection.pools import Pool, Vector, collect_pools, pick_label, score_pools

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
"""Metric and scorers of each."""
EXCLUDED = {"e2e_nlg": ("primary/*",)}
HELD_OUT = (60, None)
"""Instances that calibrate; None is half of them."""
SIZES = (1, 2, 4, None)
"""Candidates that are drawn and of which the best is picked; None is all."""
PRECISIONS = (0.5, 0.7, 0.8, 0.9)
GOOD = 0.5
Expect = Callable[[Vector, Sequence[int]], Vector]
"""The expected labels of picks by their scores and the numbers of distinct candidates."""


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
                found = measure(pools, scores, held_out, arguments.splits)
                tables.append({"set": name, "scorer": scorer, **found})
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
    """The pools of a set with two distinct candidates or more, and their scores."""
    metric, folder = SETS[name][0], work / name
    source = str(CANDIDATES / f"{name}.jsonl.gz")
    if not (folder / "annotated").exists():
        own: dict[str, Any] = {"work": folder / "work"}
        excluded = EXCLUDED.get(name, ())
        preparation(PreparationConfig(source=source, target=folder / "prepared", exclude=excluded, **own))
        annotation(AnnotationConfig(source=folder / "prepared", target=folder / "annotated", metric=metric, **own))
    pools = collect_pools(read(folder / "annotated"), metric=metric, splits={"train", "validation", "test"})
    pools = [pool for pool in pools if len(set(pool.responses)) > 1]
    stored = folder / f"{scorer}.npz"
    if not stored.exists():
        if scorer == "mbr":
            scores = [pool.mbr for pool in pools]
        else:
            scores = score_pools(pools, Scorer.load("builtin", precision="fp32").score, lambda done: None)
        np.savez(stored, *scores)
    with np.load(stored) as arrays:
        return pools, [arrays[key] for key in arrays.files]


def measure(pools: Sequence[Pool], scores: Sequence[Vector], held_out: int | None, splits: int) -> dict[str, Any]:
    """Means over the splits, and how often a promise was not kept."""
    rng = np.random.default_rng(0)
    groups = sorted({pool.instance.group_id for pool in pools})
    number = held_out or len(groups) // 2
    found: dict[str, list[float]] = {}
    for _ in range(splits):
        own = set(rng.choice(groups, number, replace=False).tolist())
        held, tested = (
            [i for i, p in enumerate(pools) if (p.instance.group_id in own) == side] for side in (True, False)
        )
        one, other = (([pools[i] for i in w], [scores[i] for i in w]) for w in (held, tested))
        for key, value in evaluate_split(one, other, rng).items():
            found.setdefault(key, []).append(value)
    values = {key: round(float(np.nanmean(own)), 4) for key, own in found.items() if not np.isnan(own).all()}
    return {"held_out": number, "tested": len(groups) - number, **values}


def evaluate_split(
    held: tuple[Sequence[Pool], Sequence[Vector]],
    tested: tuple[Sequence[Pool], Sequence[Vector]],
    rng: np.random.Generator,
) -> dict[str, float]:
    """What one split says, before and after."""
    values: dict[str, float] = {}
    maps = {"before": all_candidates(*held), "after": by_size(*held)}
    for size in SIZES:
        scores, labels, sizes = draw_picks(*tested, size, rng)
        key = "all" if size is None else str(size)
        values[f"n={key} label"] = float(labels.mean())
        for name, expect in {"raw": lambda own, _: own, **maps}.items():
            expected = expect(scores, sizes)
            values[f"n={key} {name} expected"] = float(expected.mean())
            values[f"n={key} {name} ece"] = measure_reliability(expected, labels).ece
    own, others = collect_picks(*held), collect_picks(*tested)
    groups = np.array([pool.instance.group_id for pool in held[0]])
    for wanted in PRECISIONS:
        chosen = {
            "before": luckiest(own.scores, own.labels >= GOOD, wanted),
            "after": threshold.find_lowest(own.scores, own.labels >= GOOD, groups, wanted),
        }
        for name, least in chosen.items():
            values |= {
                f"{wanted} {name} {key}": value
                for key, value in find_threshold(others.scores, others.labels, least, wanted)
            }
        expected = maps["after"](own.scores, own.sizes)
        floor = threshold.find_lowest(expected, own.labels >= GOOD, groups, wanted)
        other = maps["after"](others.scores, others.sizes)
        values |= {f"{wanted} floor {key}": value for key, value in find_threshold(other, others.labels, floor, wanted)}
    return values


def find_threshold(scores: Vector, labels: Vector, least: float | None, wanted: float) -> list[tuple[str, float]]:
    """Whether there is a threshold, what share it answers, the precision kept, and whether that is too low."""
    answered = scores >= (np.inf if least is None else least)
    precision = float((labels[answered] >= GOOD).mean()) if answered.any() else np.nan
    return [
        ("chosen", float(least is not None)),
        ("coverage", float(answered.mean())),
        ("precision", precision),
        ("broken", float(precision < wanted)),
    ]


def draw_picks(
    pools: Sequence[Pool], scores: Sequence[Vector], size: int | None, rng: np.random.Generator
) -> tuple[Vector, Vector, list[int]]:
    """Scores and labels of picks among `size` random candidates of each pool, and how many of these are distinct."""
    rows = []
    for pool, own in zip(pools, scores, strict=True):
        number = len(own) if size is None else size
        if number <= len(own):
            of = rng.choice(len(own), number, replace=False)
            distinct = len({pool.responses[index] for index in of})
            rows.append((own[of].max(), pick_label(own[of], pool.labels[of]), distinct))
    top, labels, sizes = zip(*rows, strict=True)
    return np.array(top), np.array(labels), list(sizes)


def by_size(pools: Sequence[Pool], scores: Sequence[Vector]) -> Expect:
    """The product's own calibration."""
    found = fit(pools, scores, "label")
    assert found is not None
    return lambda own, sizes: np.array(
        [found.apply([score], n=n)[0] for score, n in zip(own.tolist(), sizes, strict=True)]
    )


def all_candidates(pools: Sequence[Pool], scores: Sequence[Vector]) -> Expect:
    """The former calibration: one isotonic map of all candidates."""
    values, labels = np.concatenate(scores), np.concatenate([pool.labels for pool in pools])
    points, where = np.unique(values, return_inverse=True)
    weights = np.bincount(where).astype(np.float64)
    levels = isotonic_regression(np.bincount(where, weights=labels) / weights, weights=weights)
    return lambda own, sizes: np.interp(own, points, levels.x)


def luckiest(scores: Vector, good: "np.ndarray[Any, np.dtype[np.bool_]]", precision: float) -> float | None:
    """The former threshold: the lowest at and above which the held-out picks happen to be good enough."""
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
    for own in tables:
        shown = ["label", "before expected", "after expected", "raw ece", "before ece", "after ece"]
        cells = [f"{100 * own[f'n=all {key}']:.1f}" for key in shown]
        lines.append(f"| {own['set']} | {own['scorer']} | {own['held_out']} | {' | '.join(cells)} |")
    lines += [
        "",
        "| set | scorer | held out | wanted | before: kept | broken | answered | after: kept | broken | answered |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for own in tables:
        for wanted in PRECISIONS:
            cells = []
            for name in ("before", "after"):
                for key in ("precision", "broken", "coverage"):
                    value = own.get(f"{wanted} {name} {key}")
                    cells.append("" if value is None else f"{100 * value:.0f}")
            head = f"| {own['set']} | {own['scorer']} | {own['held_out']}"
            lines.append(f"{head} | {100 * wanted:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
