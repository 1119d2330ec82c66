"""Intervals hold what they say, at small numbers of groups too."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_1samp

from cappy.evaluation.findings import Difference
from cappy.evaluation.statistics import (
    adjust_p_values,
    compare,
    compute_power,
    estimate_means,
    estimate_share,
    lower_bound,
)

Draw = Callable[[np.random.Generator, int], np.ndarray]


def alone(count: int) -> list[str]:
    return [str(index) for index in range(count)]


def against_nothing(values: np.ndarray, groups: Sequence[str] | None = None) -> Difference:
    return compare(values, np.zeros(len(values)), groups or alone(len(values)))


def losses(share: float) -> Draw:
    """Small gains nearly always, a large loss now and then; 0 in the mean."""
    return lambda rng, count: np.where(rng.random(count) < share, share - 1, share)


SHAPES: dict[str, Draw] = {
    "normal": lambda rng, count: rng.normal(size=count) / 5,
    "60% zeros": lambda rng, count: rng.normal(size=count) / 5 * (rng.random(count) > 0.6),
    "accuracy": lambda rng, count: rng.choice([-1.0, 0.0, 1.0], p=[0.15, 0.7, 0.15], size=count),
    "skewed to losses": lambda rng, count: (1 - rng.exponential(size=count)) / 10,
    "skewed to gains": lambda rng, count: (rng.exponential(size=count) - 1) / 10,
    "a large loss in ten": losses(0.1),
    "a large loss in five": losses(0.2),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("groups", "most"), [(30, 0.07), (100, 0.06)])
def test_scorers_that_are_equal_in_truth_are_seldom_shown_to_differ(shape: str, groups: int, most: float) -> None:
    """2,000 draws a case; benchmarks/intervals.py has more draws, more shapes and the intervals that do worse."""
    rng = np.random.default_rng(1)
    result = [against_nothing(SHAPES[shape](rng, groups)) for _ in range(2000)]
    shown = np.mean([one.low > 0 and bool(one.standard_error) for one in result])
    held = np.mean([one.low <= 0 <= one.high for one in result])
    assert shown <= (most if "loss" in shape else 0.035)
    assert held >= 0.93 or "skewed to losses" in shape


def test_without_skewness_it_is_students_interval() -> None:
    half = np.random.default_rng(0).normal(size=20) / 5
    values = np.concatenate([half, -half]) + 0.03
    result, expected = against_nothing(values), ttest_1samp(values, 0)
    interval = expected.confidence_interval(0.95)
    assert (result.low, result.high, result.p_value) == pytest.approx((interval.low, interval.high, expected.pvalue))


def test_intervals_of_grouped_data_hold_the_true_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    groups = [str(index // 4) for index in range(240)]
    held = 0
    for _ in range(400):
        values = 0.5 + (rng.normal(size=60).repeat(4) + rng.normal(size=240) / 2) / 20
        (result,) = estimate_means(values[:, None], groups)
        held += result.low <= 0.5 <= result.high
    assert 0.92 <= held / 400 <= 0.98


def test_a_few_large_groups_do_not_pass_for_many() -> None:
    """Three groups have three quarters of the instances: 33 groups are worth about 5."""
    rng = np.random.default_rng(0)
    groups = [name for index in range(33) for name in [str(index)] * (30 if index < 3 else 1)]
    shown = 0
    for _ in range(1000):
        values = dict(zip(dict.fromkeys(groups), rng.normal(size=33) / 5, strict=True))
        shown += against_nothing(np.array([values[name] for name in groups]), groups).low > 0
    assert shown / 1000 <= 0.05


def test_instances_of_one_group_are_no_evidence_however_many() -> None:
    result = against_nothing(np.random.default_rng(0).random(200), ["one"] * 200)
    assert (result.low, result.high, result.p_value, result.standard_error) == (-1.0, 1.0, 1.0, None)
    assert compute_power(result).groups_needed is None


def test_groups_of_one_value_make_wider_intervals_than_the_same_instances_drawn_alone() -> None:
    values = np.random.default_rng(0).random(50).repeat(4)
    together = against_nothing(values, [str(index // 4) for index in range(200)])
    alone_error = against_nothing(values).standard_error
    assert alone_error is not None
    assert together.standard_error == pytest.approx(2 * alone_error, rel=0.01)


def test_a_difference_that_never_varies_allows_for_what_was_not_drawn() -> None:
    """Of 30 draws, a share of 11.6 % is missed with a probability of 2.5 %."""
    result = against_nothing(np.full(30, 0.05))
    assert (result.low, result.p_value) == (pytest.approx(0.05 - 0.1157 * 1.05, abs=1e-3), 1.0)
    same = against_nothing(np.zeros(30))
    assert (same.low, same.high, same.p_value) == (0.0, 0.0, 1.0)


def test_the_p_value_is_the_level_at_which_the_interval_touches_zero() -> None:
    rng = np.random.default_rng(0)
    for values in (rng.exponential(size=50) - 0.8, 0.8 - rng.exponential(size=50), rng.normal(size=50) + 0.2):
        result = against_nothing(values / 10)
        turned = against_nothing(-values / 10)
        assert turned.p_value == pytest.approx(result.p_value)
        better = result if result.difference > 0 else turned
        assert lower_bound(better, 1 - better.p_value) == pytest.approx(0.0, abs=1e-9)


def test_another_level_gives_another_bound() -> None:
    result = against_nothing(np.random.default_rng(0).random(50) - 0.3)
    assert lower_bound(result, 0.95) == pytest.approx(result.low)
    assert lower_bound(result, 0.9974) < result.low


def test_intervals_stay_where_labels_are() -> None:
    (high,) = estimate_means(np.array([[1.0]] * 39 + [[0.5]]), alone(40))
    assert high.high == 1.0
    (single,) = estimate_means(np.array([[0.4]]), ["a"])
    assert (single.low, single.high) == (0.0, 1.0)


@pytest.mark.parametrize("alike", [0.01, 0.4, 0.95])
@pytest.mark.parametrize("truth", [0.8, 0.95])
def test_the_interval_of_a_share_holds_the_truth_however_alike_the_picks_of_a_group_are(
    truth: float, alike: float
) -> None:
    """20 groups of 4; near 1 percentiles of resamples would hold it in as few as two tries of three."""
    rng = np.random.default_rng(0)
    groups = [str(index // 4) for index in range(80)]
    held = 0
    for _ in range(200):
        chances = rng.beta((1 / alike - 1) * truth, (1 / alike - 1) * (1 - truth), size=20).repeat(4)
        good = (rng.random(80) < chances).astype(np.float64)
        result = estimate_share(good, groups)
        held += result.low <= truth <= result.high
    assert held / 200 >= 0.92


def test_a_share_of_instances_on_their_own_has_the_exact_interval() -> None:
    good = np.array([1.0] * 70 + [0.0] * 30)
    result = estimate_share(good, [str(index) for index in range(100)])
    exact = binomtest(70, 100).proportion_ci(method="exact")
    assert (result.mean, result.low, result.high) == pytest.approx((0.7, exact.low, exact.high), abs=0.005)


def test_instances_of_a_group_that_are_not_alike_count_each() -> None:
    good = (np.random.default_rng(0).random(400) < 0.7).astype(np.float64)
    result = estimate_share(good, [str(index // 4) for index in range(400)])
    exact = binomtest(int(good.sum()), 400).proportion_ci(method="exact")
    assert result.high - result.low == pytest.approx(exact.high - exact.low, rel=0.15)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_where_all_are_alike_each_group_counts_once(value: float) -> None:
    result = estimate_share(np.full(40, value), [str(index // 4) for index in range(40)])
    exact = binomtest(int(10 * value), 10).proportion_ci(method="exact")
    assert (result.low, result.high) == pytest.approx((exact.low, exact.high))


def test_differences_are_paired() -> None:
    base = np.random.default_rng(0).random(100)
    result = compare(base + 0.01 * np.tile([1, 2], 50), base, alone(100))
    assert result.difference == pytest.approx(0.015)
    assert 0.013 < result.low < result.high < 0.017


def test_a_difference_of_the_smallest_size_is_shown_in_four_of_five_tries() -> None:
    rng = np.random.default_rng(0)
    smallest = 2.83 * np.sqrt(2) / np.sqrt(200) / 10
    tries = [compare(values[:, 0], values[:, 1], alone(200)) for values in _pairs(rng, smallest, 400)]
    assert np.mean([compute_power(one).smallest for one in tries]) == pytest.approx(smallest, rel=0.03)
    assert 0.75 < np.mean([one.low > 0 for one in tries]) < 0.85


def _pairs(rng: np.random.Generator, difference: float, count: int) -> Iterator[np.ndarray]:
    for _ in range(count):
        yield rng.normal(size=(200, 2)) / 10 + np.array([difference, 0.0])


def test_a_difference_half_the_smallest_needs_four_times_the_groups() -> None:
    values = np.random.default_rng(0).normal(size=50) / 10
    values -= values.mean()
    smallest = compute_power(against_nothing(values + 0.01)).smallest
    assert compute_power(against_nothing(values + smallest / 2)).groups_needed == pytest.approx(200, abs=1)
    assert compute_power(against_nothing(values)).groups_needed is None


def test_holm_multiplies_the_smallest_by_all_and_never_turns_the_order() -> None:
    """The example of three hypotheses at 0.01, 0.02 and 0.04: 3 x 0.01, 2 x 0.02, then the highest so far."""
    result = adjust_p_values({"c": 0.04, "a": 0.01, "b": 0.02})
    assert list(result) == ["c", "a", "b"]
    assert result == pytest.approx({"a": 0.03, "b": 0.04, "c": 0.04})
    assert adjust_p_values({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}
