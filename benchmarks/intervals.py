"""Simulates how often the gate promotes a scorer that is no better, and how often an interval covers the true value.

    python benchmarks/intervals.py [--trials 2000] [--whole 200] [--rivals 300]

Every trial draws paired differences with a true mean of 0 over 30, 100 or 300 groups, and calls `compare` for the
interval and `decide` for the decision. Distributions: normal, many ties, accuracies, skewed ones, and differences of
two random picks from real pools (if ../shared/data is available). `--whole` is the number of trials of a full
`evaluate` with two random scorers, one of them the champion. `--rivals` is the number of trials of other intervals on
the same draws: the percentile bootstrap, the studentised bootstrap, BCa and Student's t.

Writes benchmarks/results/intervals.json and prints the table of docs/guides/evaluation.md.
"""

import argparse
import gzip
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from machine import machine
from scipy import stats

from cappy.annotation import rouge_l
from cappy.evaluation import Difference, evaluate
from cappy.evaluation.statistics import compare
from cappy.records import Candidate, Instance
from cappy.registry.gate import decide

RESULT = Path(__file__).parent / "results" / "intervals.json"
POOLS = Path(__file__).parents[2] / "shared" / "data" / "candidates"
GROUPS = (30, 100, 300)
REAL = {"e2e_nlg": 1.0, "commongen": 1.0, "qwen05_small": 1.0, "summeval": 1.0}
RESAMPLES = 1000
Vector = npt.NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Vector]
Interval = tuple[float, float]


def rare_loss(share: float) -> Draw:
    """Small gains, and a large loss in a `share` of groups; the mean is 0."""
    return lambda rng, count: np.where(rng.random(count) < share, share - 1, share)


SYMMETRIC: Mapping[str, Draw] = {
    "normal": lambda rng, count: rng.normal(size=count) / 5,
    "60% ties": lambda rng, count: rng.normal(size=count) / 5 * (rng.random(count) > 0.6),
    "90% ties": lambda rng, count: rng.normal(size=count) / 5 * (rng.random(count) > 0.9),
    "accuracy, 30% differ": lambda rng, count: rng.choice([-1.0, 0.0, 1.0], p=[0.15, 0.7, 0.15], size=count),
    "accuracy, 10% differ": lambda rng, count: rng.choice([-1.0, 0.0, 1.0], p=[0.05, 0.9, 0.05], size=count),
}
SKEWED: Mapping[str, Draw] = {
    "a large loss in 5": rare_loss(0.2),
    "a large loss in 10": rare_loss(0.1),
    "a large loss in 20": rare_loss(0.05),
    "exponential losses": lambda rng, count: (1 - rng.exponential(size=count)) / 10,
    "log-normal losses": lambda rng, count: (np.exp(0.5) - rng.lognormal(size=count)) / 20,
    "exponential gains": lambda rng, count: (rng.exponential(size=count) - 1) / 10,
}


def main() -> None:
    """Simulates and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--whole", type=int, default=200)
    parser.add_argument("--rivals", type=int, default=300)
    arguments = parser.parse_args()
    real = {f"random picks of {name}": picks_of(pools) for name in REAL if (pools := read_pools(name))}
    shapes = {"symmetric": {**SYMMETRIC, **real}, "skewed": SKEWED}
    rows = [
        {"kind": kind, "shape": name, "groups": groups, **simulate(draw, groups, arguments.trials, arguments.rivals)}
        for kind, draws in shapes.items()
        for name, draw in draws.items()
        for groups in GROUPS
    ]
    clustered = [simulate_clusters(name, sizes, arguments.trials) for name, sizes in SIZES.items()]
    whole = [simulate_evaluation(groups, arguments.whole) for groups in GROUPS]
    values = {
        "benchmark": "intervals",
        "date": date.today().isoformat(),
        "machine": machine(),
        **vars(arguments),
        "rows": rows,
        "clustered": clustered,
        "through_evaluate": whole,
    }
    RESULT.write_text(json.dumps(values, indent=1) + "\n")
    print("\n".join(table(rows)))
    print(json.dumps({"clustered": clustered, "through_evaluate": whole}, indent=1))


def simulate(draw: Draw, groups: int, trials: int, rivals: int) -> dict[str, Any]:
    """Share of promotions and coverage of 0, for our interval and for the others."""
    rng = np.random.default_rng(groups)
    names = [str(index) for index in range(groups)]
    promoted = covered = 0
    others: dict[str, list[int]] = {name: [0, 0] for name in RIVALS}
    for trial in range(trials):
        values = draw(rng, groups)
        difference = compare(values, np.zeros(groups), names)
        promoted += is_promoted(difference)
        covered += difference.low <= 0 <= difference.high
        for name, rival in RIVALS.items() if trial < rivals else ():
            low, high = rival(values, rng)
            others[name][0] += low > 0 and bool(np.ptp(values) > 1e-9)
            others[name][1] += low <= 0 <= high
    return {
        "promoted": round(promoted / trials, 4),
        "coverage": round(covered / trials, 4),
        "rivals": {name: [round(count / rivals, 3) for count in counts] for name, counts in others.items()},
    }


def is_promoted(difference: Difference) -> bool:
    """Whether the gate promotes on a report with this difference to the champion."""
    report = {"comparisons": {"scorer-champion": difference}, "facts": {"groups": difference.groups}, "split": "test"}
    return decide(report, has_champion=True).decision == "promote"


SIZES: Mapping[str, Callable[[np.random.Generator], npt.NDArray[np.int64]]] = {
    "100 groups of 1 to 20 instances, geometric": lambda rng: np.minimum(rng.geometric(0.2, size=100), 20),
    "100 groups, three of them with half of all instances": lambda rng: np.array([32] * 3 + [1] * 97),
    "100 groups, one of them with half of all instances": lambda rng: np.array([99] + [1] * 99),
    "30 groups of ten instances": lambda rng: np.full(30, 10),
}


def simulate_clusters(
    name: str, sizes: Callable[[np.random.Generator], npt.NDArray[np.int64]], trials: int
) -> dict[str, Any]:
    """Like `simulate`, for groups of several instances; half of the variance is between groups."""
    rng = np.random.default_rng(0)
    promoted = covered = 0
    for _ in range(trials):
        counts = sizes(rng)
        index = np.repeat(np.arange(len(counts)), counts)
        values = (rng.normal(size=len(counts))[index] + rng.normal(size=len(index))) / 10
        difference = compare(values, np.zeros(len(index)), [str(group) for group in index])
        promoted += is_promoted(difference)
        covered += difference.low <= 0 <= difference.high
    return {"sizes": name, "promoted": round(promoted / trials, 4), "coverage": round(covered / trials, 4)}


def simulate_evaluation(groups: int, trials: int) -> dict[str, Any]:
    """Share of promotions of one random scorer over another, by a full evaluation."""
    rng = np.random.default_rng(groups)
    promoted = 0
    for _ in range(trials):
        instances = [instance(rng, index) for index in range(groups)]
        report = evaluate(instances, score=random_scorer(rng), champion=random_scorer(rng), with_probes=False)
        promoted += decide(report.to_dict(), has_champion=True).decision == "promote"
    return {"groups": groups, "trials": trials, "promoted": promoted / trials}


def instance(rng: np.random.Generator, index: int) -> Instance:
    labels = np.round(rng.beta(0.5, 0.5, size=4), 2)
    candidates = tuple(
        Candidate(response=f"response {number} of {index}", labels={"rougeL": float(label)})
        for number, label in enumerate(labels)
    )
    return Instance(
        instance_id=str(index),
        group_id=f"group {index:06d}",
        task="simulated",
        split="test",
        instruction=f"instruction {index}",
        references=("reference",),
        candidates=candidates,
    )


def random_scorer(rng: np.random.Generator) -> Callable[[Sequence[tuple[str, str]]], list[float]]:
    """A scorer that returns random numbers."""
    return lambda pairs: rng.random(len(pairs)).tolist()


def read_pools(name: str) -> list[Vector]:
    """Rouge-L labels of the candidates of each pool in a set; empty if the set is missing."""
    path = POOLS / f"{name}.jsonl.gz"
    if not path.is_file():
        return []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in list(file)[:630]]
    pools = [
        np.array([rouge_l(row["references"], candidate["text"]) for candidate in row["candidates"]]) for row in rows
    ]
    return [pool for pool in pools if len(pool) > 1]


def picks_of(pools: Sequence[Vector]) -> Draw:
    """Differences of the labels of two random picks, from pools drawn with replacement."""

    def draw(rng: np.random.Generator, count: int) -> Vector:
        chosen = [pools[index] for index in rng.integers(len(pools), size=count)]
        return np.array([pool[rng.integers(len(pool))] - pool[rng.integers(len(pool))] for pool in chosen])

    return draw


def student(values: Vector, rng: np.random.Generator) -> Interval:
    """Student's t interval."""
    error = values.std(ddof=1) / np.sqrt(len(values)) * stats.t.ppf(0.975, len(values) - 1)
    return float(values.mean() - error), float(values.mean() + error)


def percentile(values: Vector, rng: np.random.Generator) -> Interval:
    """The percentile bootstrap (Efron and Tibshirani, 1993, §13)."""
    means = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def bootstrap_t(values: Vector, rng: np.random.Generator) -> Interval:
    """The bootstrap-t (Efron and Tibshirani, 1993, §12.5)."""
    resamples = values[rng.integers(len(values), size=(RESAMPLES, len(values)))]
    errors, shifts = resamples.std(axis=1, ddof=1), resamples.mean(axis=1) - values.mean()
    statistics = np.where(errors > 0, shifts / np.where(errors > 0, errors, 1), np.sign(shifts) * 50)
    low, high = np.quantile(np.clip(statistics, -50, 50), [0.025, 0.975])
    spread = values.std(ddof=1)
    return float(values.mean() - high * spread), float(values.mean() - low * spread)


def bca(values: Vector, rng: np.random.Generator) -> Interval:
    """Bias-corrected and accelerated, by scipy."""
    if np.ptp(values) < 1e-9:
        return float(values[0]), float(values[0])
    with warnings.catch_warnings():
        # scipy warns if the acceleration is undefined, and returns NaN.
        warnings.simplefilter("ignore")
        interval = stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="BCa", rng=rng).confidence_interval
    return float(np.nan_to_num(interval.low, nan=values.min())), float(np.nan_to_num(interval.high, nan=values.max()))


RIVALS = {"student": student, "percentile": percentile, "studentised": bootstrap_t, "bca": bca}


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows as a Markdown table: promoted / coverage in percent, by number of groups."""
    lines = [
        "| true differences, mean 0 | 30 groups | 100 | 300 | percentile bootstrap, 30 groups |",
        "|---|---|---|---|---|",
    ]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        row_by_groups = {row["groups"]: row for row in rows if row["shape"] == shape}
        cells = [
            f"{100 * row_by_groups[groups]['promoted']:.1f} / {100 * row_by_groups[groups]['coverage']:.1f}"
            for groups in GROUPS
        ]
        percentile_row = row_by_groups[GROUPS[0]]["rivals"]["percentile"]
        lines.append(
            f"| {shape} | {' | '.join(cells)} | {100 * percentile_row[0]:.1f} / {100 * percentile_row[1]:.1f} |"
        )
    return lines


if __name__ == "__main__":
    main()
