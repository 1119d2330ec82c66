"""How long the bootstrap of an evaluation takes, and how much memory.

    python benchmarks/evaluation.py [--instances 10000] [--resamples 10000] [--selectors 13]

Writes benchmarks/results/evaluation.json: seconds for all resampled means, and for an interval and a paired difference
of every pair of selectors; scipy.stats.bootstrap of one mean, in the same run, for comparison.
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

from cappy.evaluation.statistics import compare, estimate, resampled_means

RESULT = Path(__file__).parent / "results" / "evaluation.json"


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=10_000)
    parser.add_argument("--resamples", type=int, default=10_000)
    parser.add_argument("--selectors", type=int, default=13)
    arguments = parser.parse_args()
    values = np.random.default_rng(0).random((arguments.instances, arguments.selectors))
    result = {"benchmark": "evaluation", "date": date.today().isoformat(), "machine": machine(), **vars(arguments)}
    result["seconds"], intervals = timed(lambda: intervals_of(values, arguments.resamples))
    result["scipy_seconds_for_one_mean"], other = timed(lambda: by_scipy(values[:, 0], arguments.resamples))
    result["interval"], result["scipy_interval"] = intervals[0], other
    result["peak_memory_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def intervals_of(values: np.ndarray[Any, Any], resamples: int) -> list[tuple[float, float]]:
    """The interval of every selector; the differences of all pairs are computed too."""
    groups = [str(index) for index in range(len(values))]
    samples = resampled_means(values, groups, resamples=resamples, seed=0).T
    means = values.mean(axis=0)
    for one, two in itertools.combinations(range(values.shape[1]), 2):
        compare(means[one], means[two], samples[one], samples[two])
    found = [estimate(mean, own) for mean, own in zip(means, samples, strict=True)]
    return [(round(own.low, 5), round(own.high, 5)) for own in found]


def by_scipy(values: np.ndarray[Any, Any], resamples: int) -> tuple[float, float]:
    """The same interval of one mean by scipy."""
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=resamples, method="percentile", batch=100, rng=np.random.default_rng(0)
    ).confidence_interval
    return round(float(found.low), 5), round(float(found.high), 5)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and the result."""
    started = time.monotonic()
    done = work()
    return round(time.monotonic() - started, 2), done


if __name__ == "__main__":
    main()
