"""Time and memory of the confidence intervals of an evaluation.

    python benchmarks/evaluation.py [--instances 10000] [--selectors 14]

Writes benchmarks/results/evaluation.json: seconds for the interval of every selector and the paired difference of every
pair of selectors; for comparison, scipy.stats.bootstrap of one mean (BCa, 10,000 resamples) in the same run.
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
    """The interval of every selector; also computes the differences of all pairs."""
    groups = [str(index) for index in range(len(values))]
    for first, second in itertools.combinations(range(values.shape[1]), 2):
        compare(values[:, first], values[:, second], groups)
    return [(round(estimate.low, 5), round(estimate.high, 5)) for estimate in estimate_means(values, groups)]


def by_scipy(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """The interval of one mean by scipy."""
    interval = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="BCa", batch=100, rng=np.random.default_rng(0)
    ).confidence_interval
    return round(float(interval.low), 5), round(float(interval.high), 5)


def time_call(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and its result."""
    started = time.monotonic()
    result = function()
    return round(time.monotonic() - started, 2), result


if __name__ == "__main__":
    main()
