"""Best-of-n equals what all subsets give."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from cappy.records import Candidate, Instance
from cappy.selection.curves import (
    best_of_n_curve,
    best_probabilities,
    extend_curve,
    mbr_curve,
    num_worthwhile_candidates,
    sample_picks,
)
from cappy.selection.linear import Feature, PoolFeatures, Rule, Selector
from cappy.selection.pools import Pool, mbr, pick, pick_label, pick_labels

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_the_curve_equals_the_mean_over_all_subsets_ties_included(size: int) -> None:
    values, labels = RNG.integers(3, size=size).astype(float), RNG.random(size)
    brute = [
        np.mean([pick_label(values[list(s)], labels[list(s)]) for s in itertools.combinations(range(size), n)])
        for n in range(1, size + 1)
    ]
    assert best_of_n_curve(values, labels) == pytest.approx(brute, abs=1e-12)


def test_the_curve_runs_from_the_mean_to_the_pick_and_the_oracles_never_falls() -> None:
    values, labels = RNG.random(56), RNG.random(56)
    curve = best_of_n_curve(values, labels)
    assert curve[0] == pytest.approx(labels.mean())
    assert curve[-1] == pytest.approx(labels[pick(values)])
    assert (np.diff(best_of_n_curve(labels, labels)) > -1e-12).all()


def test_probabilities_of_a_large_pool_are_finite_and_add_up_to_one() -> None:
    table = best_probabilities(1000)
    assert np.isfinite(table).all()
    assert table.sum(axis=1) == pytest.approx(np.ones(1000), abs=1e-9)


TEXTS = ("a b c d", "a b c e", "a b x y", "q r s t", "a c d e f", "b c d")


def test_the_mbr_curve_comes_near_the_mean_over_all_subsets_and_ends_at_its_pick() -> None:
    labels = RNG.random(len(TEXTS))
    curve = mbr_curve(TEXTS, labels, np.random.default_rng(0), num_orders=4000)
    for n in range(1, len(TEXTS) + 1):
        subsets = itertools.combinations(range(len(TEXTS)), n)
        brute = np.mean([pick_label(mbr([TEXTS[i] for i in s]), labels[list(s)]) for s in subsets])
        assert curve[n - 1] == pytest.approx(brute, abs=0.02)
    assert curve[-1] == pytest.approx(labels[pick(mbr(TEXTS))])


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_of_two_candidates_mbr_is_worth_exactly_a_random_one(size: int) -> None:
    """Two texts are as near to each other as to one another: the first of a pool must not win by standing first."""
    texts = [f"a b {' c' * index}" for index in range(size)]
    labels = np.linspace(1.0, 0.0, size) if size > 1 else np.array([1.0])
    curve = mbr_curve(tuple(texts), labels, np.random.default_rng(0), num_orders=2)
    assert curve[: min(2, size)].tolist() == [labels.mean()] * min(2, size)


def test_the_order_of_a_pool_says_nothing_of_a_selector_that_ties() -> None:
    """Of candidates with equal values the result is their mean label, in the curve as in the table's row."""
    texts: tuple[str, ...] = ("x y z", "x y w", "x y z", "q r s", "q r t")
    labels, turned = np.array([0.9, 0.1, 0.9, 0.4, 0.2]), slice(None, None, -1)
    for values in (np.zeros(5), np.array([1.0, 1.0, 0.0, 0.0, 1.0]), mbr(texts)):
        forth, back = best_of_n_curve(values, labels), best_of_n_curve(values[turned], labels[turned])
        assert forth == pytest.approx(back)
        assert forth[-1] == pytest.approx(pick_label(values, labels))
    assert best_of_n_curve(np.zeros(5), labels) == pytest.approx(np.full(5, labels.mean()))
    curves = [
        mbr_curve(texts[turn], labels[turn], np.random.default_rng(0), num_orders=4000)
        for turn in (slice(None), turned)
    ]
    assert curves[0] == pytest.approx(curves[1], abs=0.02)


def test_the_curve_ends_at_what_the_tables_row_says() -> None:
    rng = np.random.default_rng(0)
    pools = []
    for index in range(20):
        candidates = tuple(Candidate(response=" ".join(rng.choice(list("abcdef"), 4))) for _ in range(6))
        instance = Instance(instance_id=str(index), instruction="i", references=("r",), candidates=candidates)
        pools.append(Pool(instance, candidates, rng.random(6)))
    values = [rng.integers(2, size=len(pool.labels)).astype(float) for pool in pools]
    ends = [best_of_n_curve(own, pool.labels)[-1] for own, pool in zip(values, pools, strict=True)]
    assert pick_labels(pools, values) == pytest.approx(ends)
    consensus = [mbr(pool.responses) for pool in pools]
    ends = [mbr_curve(pool.responses, pool.labels, rng)[-1] for pool in pools]
    assert pick_labels(pools, consensus) == pytest.approx(ends)


def test_a_smaller_pool_keeps_its_last_result() -> None:
    assert extend_curve(np.array([0.2, 0.4]), 4).tolist() == [0.2, 0.4, 0.4, 0.4]


def test_more_candidates_pay_as_long_as_one_adds_a_tenth_of_a_point() -> None:
    assert num_worthwhile_candidates([0.5, 0.6, 0.65, 0.6505, 0.6505]) == 3
    assert num_worthwhile_candidates([0.5, 0.5, 0.5, 0.6]) == 4
    assert num_worthwhile_candidates([0.5, 0.5]) == 1
    assert num_worthwhile_candidates([0.5]) == 1


def features(size: int, *, greedy: int | None = None) -> PoolFeatures:
    """A pool whose responses resemble each other more or less."""
    words = "a b c d e f g h".split()
    responses = [" ".join(RNG.choice(words, size=5)) for _ in range(size)]
    return PoolFeatures(
        responses=responses, scores=RNG.random(size), likelihoods=RNG.normal(size=size).tolist(), greedy=greedy
    )


ALL_FEATURES = Selector(
    rules=(Rule(features=("score", "mbr", "likelihood", "greedy"), weights=(2.0, 1.0, 0.5, 1.5), scales=(1.0,) * 4),)
)


@pytest.mark.parametrize("size", [1, 2, 6])
def test_the_selectors_pick_of_a_subset_is_that_of_the_selector_itself(size: int) -> None:
    pool, labels = features(size, greedy=size - 1), RNG.random(size)
    expected = {
        frozenset(subset): ALL_FEATURES.values(_part(pool, subset))
        for n in range(1, size + 1)
        for subset in itertools.permutations(range(size), n)
    }
    orders = np.random.default_rng(3)
    picks = sample_picks(ALL_FEATURES, pool, labels, np.random.default_rng(3), greedy_first=False, num_orders=40)
    for row in range(40):
        order = orders.permutation(size)
        for n in range(1, size + 1):
            subset = list(order[:n])
            values = ALL_FEATURES.values(_part(pool, subset))
            assert expected[frozenset(subset)].max() == pytest.approx(values.max())
            assert picks.labels[row, n - 1] == pytest.approx(pick_label(values, labels[subset]))
            assert picks.scores[row, n - 1] == pytest.approx(pick_label(values, pool.scores[subset]))


def _part(pool: PoolFeatures, subset: Sequence[int]) -> PoolFeatures:
    """The candidates of a subset; the greedy response is known to be absent if it is not among them."""
    likelihoods = None if pool.likelihoods is None else [pool.likelihoods[index] for index in subset]
    part = PoolFeatures(
        responses=[pool.responses[index] for index in subset],
        scores=pool.scores[list(subset)],
        likelihoods=likelihoods,
        greedy=next((place for place, index in enumerate(subset) if index == pool.greedy), None),
    )
    # A rule without the greedy response has the same other weights here, as if no candidate were greedy.
    return part if part.greedy is not None else _AbsentGreedy(**vars(part))


class _AbsentGreedy(PoolFeatures):
    @property
    def available(self) -> frozenset[Feature]:
        return frozenset({"score", "mbr", "likelihood", "greedy"})


def test_a_curve_that_starts_with_the_greedy_response_has_its_label_at_one_and_the_whole_pool_at_the_end() -> None:
    pool, labels = features(7, greedy=2), RNG.random(7)
    picks = sample_picks(ALL_FEATURES, pool, labels, RNG, greedy_first=True)
    assert set(picks.labels[:, 0]) == {labels[2]}
    assert set(picks.labels[:, -1]) == {pick_label(ALL_FEATURES.values(pool), labels)}
