"""Best-of-n equals what all subsets give."""

import itertools

import numpy as np
import pytest

from cappy.evaluation.curve import best_probabilities, extended, mbr_curve, pays_until, ranked_curve
from cappy.evaluation.selectors import mbr, pick

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_the_curve_equals_the_mean_over_all_subsets_ties_included(size: int) -> None:
    values, labels = RNG.integers(3, size=size).astype(float), RNG.random(size)
    brute = [
        np.mean([labels[s[pick(values[list(s)])]] for s in itertools.combinations(range(size), n)])
        for n in range(1, size + 1)
    ]
    assert ranked_curve(values, labels) == pytest.approx(brute, abs=1e-12)


def test_the_curve_runs_from_the_mean_to_the_pick_and_the_oracles_never_falls() -> None:
    values, labels = RNG.random(56), RNG.random(56)
    curve = ranked_curve(values, labels)
    assert curve[0] == pytest.approx(labels.mean())
    assert curve[-1] == pytest.approx(labels[pick(values)])
    assert (np.diff(ranked_curve(labels, labels)) > -1e-12).all()


def test_probabilities_of_a_large_pool_are_finite_and_add_up_to_one() -> None:
    table = best_probabilities(1000)
    assert np.isfinite(table).all()
    assert table.sum(axis=1) == pytest.approx(np.ones(1000), abs=1e-9)


TEXTS = ("a b c d", "a b c e", "a b x y", "q r s t", "a c d e f", "b c d")


def test_the_mbr_curve_comes_near_the_mean_over_all_subsets_and_ends_at_its_pick() -> None:
    labels = RNG.random(len(TEXTS))
    curve = mbr_curve(TEXTS, labels, np.random.default_rng(0), draws=4000)
    for n in range(1, len(TEXTS) + 1):
        subsets = itertools.combinations(range(len(TEXTS)), n)
        brute = np.mean([labels[s[pick(mbr([TEXTS[i] for i in s]))]] for s in subsets])
        assert curve[n - 1] == pytest.approx(brute, abs=0.02)
    assert curve[-1] == pytest.approx(labels[pick(mbr(TEXTS))])


def test_a_smaller_pool_keeps_its_last_result() -> None:
    assert extended(np.array([0.2, 0.4]), 4).tolist() == [0.2, 0.4, 0.4, 0.4]


def test_more_candidates_pay_as_long_as_one_adds_a_tenth_of_a_point() -> None:
    assert pays_until([0.5, 0.6, 0.65, 0.6505, 0.6505]) == 3
    assert pays_until([0.5, 0.5, 0.5, 0.6]) == 4
    assert pays_until([0.5, 0.5]) == 1
    assert pays_until([0.5]) == 1
