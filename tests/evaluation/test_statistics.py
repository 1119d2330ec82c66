"""Bootstrap intervals hold what they say."""

import numpy as np
import pytest
from scipy.stats import binomtest

from cappy.evaluation.findings import Difference
from cappy.evaluation.statistics import compare, estimate, holm, p_value, power, resampled_means, share


def test_intervals_of_grouped_data_hold_the_true_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    groups = [str(index // 4) for index in range(240)]
    held = 0
    for trial in range(200):
        values = (0.5 + rng.normal(size=60).repeat(4) + rng.normal(size=240) / 2)[:, None]
        found = estimate(values.mean(), resampled_means(values, groups, resamples=400, seed=trial)[:, 0])
        held += found.low <= 0.5 <= found.high
    assert 0.90 <= held / 200 <= 0.985


def test_groups_of_one_value_make_wider_intervals_than_the_same_instances_drawn_alone() -> None:
    values = np.random.default_rng(0).random(50).repeat(4)[:, None]
    together = resampled_means(values, [str(index // 4) for index in range(200)], resamples=2000, seed=0)
    alone = resampled_means(values, [str(index) for index in range(200)], resamples=2000, seed=0)
    assert together.std() / alone.std() == pytest.approx(2, rel=0.1)


def test_a_large_group_weighs_by_its_instances() -> None:
    values = np.array([[1.0], [1.0], [1.0], [0.0]])
    means = resampled_means(values, ["a", "a", "a", "b"], resamples=500, seed=0)
    assert set(np.round(means[:, 0], 6)) == {0.0, 0.75, 1.0}


@pytest.mark.parametrize("alike", [0.01, 0.4, 0.95])
@pytest.mark.parametrize("truth", [0.8, 0.95])
def test_the_interval_of_a_share_holds_the_truth_however_alike_the_picks_of_a_group_are(
    truth: float, alike: float
) -> None:
    """20 groups of 4; near 1 the percentiles of resamples alone would hold it in as few as two tries of three."""
    rng = np.random.default_rng(0)
    groups = [str(index // 4) for index in range(80)]
    held = 0
    for trial in range(200):
        chances = rng.beta((1 / alike - 1) * truth, (1 / alike - 1) * (1 - truth), size=20).repeat(4)
        good = (rng.random(80) < chances).astype(np.float64)
        found = share(good, groups, resamples=200, seed=trial)
        held += found.low <= truth <= found.high
    assert held / 200 >= 0.92


def test_a_share_of_instances_on_their_own_has_the_exact_interval() -> None:
    good = np.array([1.0] * 70 + [0.0] * 30)
    found = share(good, [str(index) for index in range(100)], resamples=5000, seed=0)
    exact = binomtest(70, 100).proportion_ci(method="exact")
    assert (found.mean, found.low, found.high) == pytest.approx((0.7, exact.low, exact.high), abs=0.005)


def test_instances_of_a_group_that_are_not_alike_count_each() -> None:
    good = (np.random.default_rng(0).random(400) < 0.7).astype(np.float64)
    found = share(good, [str(index // 4) for index in range(400)], resamples=5000, seed=0)
    exact = binomtest(int(good.sum()), 400).proportion_ci(method="exact")
    assert found.high - found.low == pytest.approx(exact.high - exact.low, rel=0.15)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_where_all_are_alike_each_group_counts_once(value: float) -> None:
    found = share(np.full(40, value), [str(index // 4) for index in range(40)], resamples=100, seed=0)
    exact = binomtest(int(10 * value), 10).proportion_ci(method="exact")
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high))


def test_differences_are_paired() -> None:
    base = np.random.default_rng(0).random(100)
    values = np.stack([base + 0.01, base], axis=1)
    means = resampled_means(values, [str(index) for index in range(100)], resamples=300, seed=0)
    found = compare(values[:, 0].mean(), values[:, 1].mean(), means[:, 0], means[:, 1])
    assert (found.difference, found.low, found.high) == pytest.approx((0.01, 0.01, 0.01))
    assert found.probability == 1.0


def test_equal_selectors_have_an_even_chance() -> None:
    same = np.linspace(0, 1, 50)
    assert compare(0.5, 0.5, same, same).probability == 0.5


def test_the_seed_decides_and_chunks_do_not_repeat() -> None:
    values = np.random.default_rng(0).random((5000, 1))
    groups = [str(index) for index in range(5000)]
    first, again, other = (resampled_means(values, groups, resamples=450, seed=seed) for seed in (3, 3, 4))
    assert (first == again).all()
    assert (first != other).any()
    assert len(np.unique(first)) == 450


def test_a_difference_of_the_smallest_size_is_shown_in_four_of_five_tries() -> None:
    rng = np.random.default_rng(0)
    groups = [str(index) for index in range(200)]
    smallest = 2.8 * np.sqrt(2) / np.sqrt(200)
    shown = []
    found = []
    for trial in range(300):
        values = rng.normal(size=(200, 2)) + np.array([smallest, 0.0])
        samples = resampled_means(values, groups, resamples=400, seed=trial)
        means = values.mean(axis=0)
        shown.append(compare(means[0], means[1], samples[:, 0], samples[:, 1]).low > 0)
        found.append(power(means[0] - means[1], samples[:, 0], samples[:, 1], 200).smallest)
    assert np.mean(found) == pytest.approx(smallest, rel=0.03)
    assert 0.73 < np.mean(shown) < 0.87


def test_a_difference_half_the_smallest_needs_four_times_the_groups() -> None:
    samples = np.random.default_rng(0).normal(size=4000)
    smallest = power(1.0, samples, np.zeros(4000), 50).smallest
    assert power(smallest / 2, samples, np.zeros(4000), 50).groups_needed == pytest.approx(200, abs=1)
    assert power(0.0, samples, np.zeros(4000), 50).groups_needed is None


def test_holm_multiplies_the_smallest_by_all_and_never_turns_the_order() -> None:
    """The example of three hypotheses at 0.01, 0.02 and 0.04: 3 x 0.01, 2 x 0.02, then the highest so far."""
    found = holm({"c": 0.04, "a": 0.01, "b": 0.02})
    assert list(found) == ["c", "a", "b"]
    assert found == pytest.approx({"a": 0.03, "b": 0.04, "c": 0.04})
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}


def test_no_p_value_is_below_what_the_resamples_can_tell() -> None:
    def of(probability: float) -> Difference:
        return Difference(difference=0.0, low=0.0, high=0.0, probability=probability)

    assert p_value(of(1.0), 2000) == p_value(of(0.0), 2000) == pytest.approx(0.001)
    assert p_value(of(0.5), 2000) == 1.0
    assert p_value(of(0.975), 2000) == pytest.approx(0.05)
