"""Bootstrap intervals hold what they say."""

import numpy as np
import pytest

from cappy.evaluation.statistics import compare, estimate, resampled_means


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
