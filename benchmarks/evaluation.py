"""How long the intervals of an evaluation take, and how much memory.

    python benchmarks/evaluation.py [--instances 10000] [--selectors 14]

Writes benchmarks/results/evaluation.json: seconds for an interval of every selector and a paired difference of every
pair of them; scipy.stats.bootstrap of one mean (BCa, 10,000 resamples), in the same run, for comparison.
"""

import argparse
import itertools
import json
import resource
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from scipy import stats

from cappy.evaluation.statistics import compare, estimate_means

RESULT = Path(__file__).parent / "results" / "evaluation.json"
RESAMPLES = 10_000


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=10_000)
    parser.add_argument("--selectors", type=int, default=14)
    arguments = parser.parse_args()
    values = np.random.default_rng(0).random((arguments.instances, arguments.selectors))
    result = {"benchmark": "evaluation", "date": date.today().isoformat(), "machine": machine(), **vars(arguments)}
    result["seconds"], intervals = time_call(lambda: intervals_of(values))
    result["scipy_seconds_for_one_mean"], other = time_call(lambda: by_scipy(values[:, 0]))
    result["interval"], result["scipy_interval"] = intervals[0], other
    result["peak_memory_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def intervals_of(values: np.ndarray[Any, Any]) -> list[tuple[float, float]]:
    """The interval of every selector; the differences of all pairs are computed too."""
    groups = [str(index) for index in range(len(values))]
    for one, two in itertools.combinations(range(values.shape[1]), 2):
        compare(values[:, one], values[:, two], groups)
    return [(round(own.low, 5), round(own.high, 5)) for own in estimate_means(values, groups)]


def by_scipy(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """The interval of one mean by scipy."""
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="BCa", batch=100, rng=np.random.default_rng(0)
    ).confidence_interval
    return round(float(found.low), 5), round(float(found.high), 5)


def time_call(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and the result."""
    started = time.monotonic()
    done = work()
    return round(time.monotonic() - started, 2), done


if __name__ == "__main__":
    main()
