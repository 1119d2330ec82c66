"""Calibration says how far scores are from labels, mends it on held-out instances, and abstains where it should."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibrations import straight
from wording import raises_naming

from cappy.errors import FolderError
from cappy.evaluation import calibration
from cappy.records import Candidate, Instance
from cappy.scoring.calibration import Calibration, read_calibration
from cappy.selection import Selector
from cappy.selection.linear import Rule, features_of
from cappy.selection.pools import Pool, with_scores

RNG = np.random.default_rng(0)
SCORES = RNG.random(4000)


def test_exact_scores_have_no_error_and_shifted_ones_theirs() -> None:
    assert calibration.measure_reliability(SCORES, SCORES).ece == pytest.approx(0.0, abs=1e-12)
    shifted = calibration.measure_reliability(SCORES + 0.25, SCORES)
    assert shifted.ece == pytest.approx(0.25)
    assert shifted.brier == pytest.approx(0.0625)


def test_bins_hold_every_pair_once_and_rise() -> None:
    bins = calibration.measure_reliability(SCORES, SCORES**2).bins
    assert sum(one.count for one in bins) == len(SCORES)
    assert len(bins) == calibration.NUM_BINS
    assert [one.score for one in bins] == sorted(one.score for one in bins)


def test_the_order_of_rows_changes_nothing_where_scores_are_equal() -> None:
    labels = np.repeat([0.0, 1.0], 100)
    shuffled = RNG.permutation(labels)
    level = np.full(200, 0.5)
    assert (
        calibration.measure_reliability(level, labels).ece
        == calibration.measure_reliability(level, shuffled).ece
        == 0.0
    )


def pools_of(labels: Sequence[np.ndarray], texts: Sequence[Sequence[str]] | None = None) -> list[Pool]:
    """Pools with these labels; every candidate has a text of its own unless `texts` says another."""
    return [
        Pool(
            instance=Instance(instance_id=str(index), instruction="i", references=("r",), group_id=str(index)),
            candidates=tuple(
                Candidate(response=texts[index][place] if texts else f"{place}", labels={"rougeL": float(label)})
                for place, label in enumerate(own)
            ),
            labels=np.asarray(own, dtype=np.float64),
        )
        for index, own in enumerate(labels)
    ]


def scored(pools: Sequence[Pool], scores: Sequence[np.ndarray]) -> list[Pool]:
    return with_scores(pools, "scorer", scores)


def fit(pools: Sequence[Pool], scores: Sequence[np.ndarray]) -> Calibration | None:
    """The calibration of picks by these scores alone."""
    return calibration.fit(scored(pools, scores), [Selector()] * len(pools), "rougeL", seed=0)


def picks_of(pools: Sequence[Pool], scores: Sequence[np.ndarray]) -> calibration.Picks:
    return calibration.collect_picks(scored(pools, scores), scores)


def uneven(number: int, size: int, seed: int) -> tuple[list[Pool], list[np.ndarray]]:
    """Pools whose scorer errs by pool as much as by candidate, so that the best score of many overrates its label."""
    rng = np.random.default_rng(seed)
    worth = rng.random((number, 1)) * 0.6
    labels = np.clip(worth + rng.normal(0, 0.1, (number, size)), 0, 1)
    scores = labels + rng.normal(0, 0.25, (number, size))
    return pools_of(list(labels)), list(scores)


def drawn(pools: Sequence[Pool], scores: Sequence[np.ndarray], n: int, seed: int) -> calibration.Picks:
    """The picks among `n` random candidates of each pool."""
    rng = np.random.default_rng(seed)
    result, values = [], []
    for pool, own in zip(pools, scores, strict=True):
        of = rng.choice(len(own), n, replace=False)
        candidates = tuple(pool.candidates[index] for index in of)
        result.append(Pool(instance=pool.instance, candidates=candidates, labels=pool.labels[of]))
        values.append(own[of])
    return picks_of(result, values)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_what_is_expected_of_the_best_of_n_is_on_the_mean_what_it_is_worth(n: int) -> None:
    """A map of all candidates overrates picks: the best of eight has its score by luck as much as by being right."""
    held, tested = uneven(600, 8, seed=1), uneven(600, 8, seed=2)
    fitted = fit(*held)
    assert fitted is not None
    picks = drawn(*tested, n, seed=3)
    assert picks.sizes == (n,) * 600
    assert picks.expected_labels(fitted).mean() == pytest.approx(picks.labels.mean(), abs=0.02)
    assert calibration.measure_reliability(picks.expected_labels(fitted), picks.labels).ece < 0.04
    alone = np.array(fitted.apply(picks.scores.tolist(), n=1))
    assert n < 8 or alone.mean() > picks.labels.mean() + 0.05


def test_on_the_picks_that_a_map_was_fitted_on_the_mean_is_exact() -> None:
    pools, scores = uneven(100, 6, seed=4)
    fitted = fit(pools, scores)
    assert fitted is not None
    assert [one.n for one in fitted.maps] == [1, 2, 4, 6]
    assert fitted.fitted_on == 100
    picks = picks_of(pools, scores)
    assert picks.expected_labels(fitted).mean() == pytest.approx(picks.labels.mean())
    single = np.concatenate([fitted.apply(own.tolist(), n=1) for own in scores])
    assert single.mean() == pytest.approx(np.mean([pool.labels.mean() for pool in pools]))


@pytest.mark.parametrize("seed", range(5))
def test_for_every_n_the_map_rises_with_the_score_between_0_and_1(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 9, 60)
    pools = pools_of([rng.random(size) for size in sizes])
    scores = [rng.choice([rng.normal(0, 3, size), rng.integers(3, size=size).astype(float)]) for size in sizes]
    fitted = fit(pools, scores)
    assert fitted is not None
    places = np.linspace(-9, 9, 300).tolist()
    for n in range(1, 20):
        values = fitted.apply(places, n=n)
        assert values == sorted(values)
        assert 0 <= min(values) <= max(values) <= 1


def test_between_two_n_that_were_fitted_the_map_lies_between_theirs_and_beyond_the_last_it_is_the_last() -> None:
    fitted = straight({1: 1.0, 4: 0.5})
    assert fitted.apply([1.0], n=1) == [1.0]
    assert fitted.apply([1.0], n=2) == [pytest.approx(0.75)]
    assert 0.5 < fitted.apply([1.0], n=3)[0] < 0.75
    assert fitted.apply([1.0], n=4) == fitted.apply([1.0], n=400) == [0.5]
    with pytest.raises(ValueError, match="n: must be at least 1, got 0"):
        fitted.apply([1.0], n=0)


def test_a_pool_weighs_as_much_as_another_however_many_candidates_it_has() -> None:
    labels = [np.zeros(16)] * 20 + [np.ones(2)] * 20
    fitted = fit(pools_of(labels), [np.linspace(0, 1, len(own)) for own in labels])
    assert fitted is not None
    assert np.mean([fitted.apply([score], n=1)[0] for own in labels for score in (own[0], own[-1])]) < 1
    scores = [np.full(len(own), 0.5) for own in labels]
    level = fit(pools_of(labels), scores)
    assert level is not None
    assert level.apply([0.5], n=1) == [0.5]


def test_a_text_that_stands_twice_is_one_candidate_of_a_pick() -> None:
    picks = picks_of(pools_of([np.array([0.5, 0.5, 0.1])], [["a", "a", "b"]]), [np.array([0.9, 0.9, 0.2])])
    assert (picks.sizes, picks.labels.tolist(), picks.scores.tolist()) == ((2,), [0.5], [0.9])


def test_a_pick_of_equal_scores_has_their_mean_label() -> None:
    pools, scores = pools_of([np.array([1.0, 0.0])] * 30), [np.array([0.5, 0.5])] * 30
    assert picks_of(pools, scores).labels.tolist() == [0.5] * 30
    fitted = fit(pools, scores)
    assert fitted is not None
    assert fitted.apply([0.5], n=2) == [0.5]


def test_a_lucky_few_at_the_top_do_not_promise_a_label_of_1() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(200) < 0.5).astype(float)
    labels[-3:] = 1.0
    pools, scores = pools_of([np.array([label]) for label in labels]), [np.array([index / 200]) for index in range(200)]
    fitted = fit(pools, scores)
    assert fitted is not None
    assert fitted.apply([1.0], n=1)[0] < 0.9


@pytest.mark.parametrize("copies", [1, 5])
def test_of_fewer_groups_than_20_nothing_is_fitted_however_many_picks_they_have(copies: int) -> None:
    def fit_groups(groups: int) -> Calibration | None:
        pools, scores = uneven(groups * copies, 4, seed=5)
        own = [
            Pool(replace(pool.instance, group_id=str(index // copies)), pool.candidates, pool.labels)
            for index, pool in enumerate(pools)
        ]
        return fit(own, scores)

    assert fit_groups(calibration.MIN_GROUPS - 1) is None
    result = fit_groups(calibration.MIN_GROUPS)
    assert result is not None
    assert all(len(set(one.expected)) <= 2 for one in result.maps), "two levels of ten groups"


def test_the_map_of_a_selector_of_several_features_is_that_of_its_own_picks() -> None:
    """The selector picks by likelihood, which says nothing about the label, so its picks are worth the mean label."""
    by_likelihood = Selector(rules=(Rule(features=("score", "likelihood"), weights=(0.1, 1.0)),))
    held, tested = uneven(600, 8, seed=1), uneven(600, 8, seed=2)
    rng = np.random.default_rng(3)

    def with_likelihoods(pools: Sequence[Pool]) -> list[Pool]:
        return [
            replace(pool, candidates=tuple(replace(each, logprob_mean=rng.normal()) for each in pool.candidates))
            for pool in pools
        ]

    held_pools, pools = (with_likelihoods(scored(*part)) for part in (held, tested))
    fitted = calibration.fit(held_pools, [by_likelihood] * len(held_pools), "rougeL", seed=0)
    assert fitted is not None
    values = [by_likelihood.values(features_of(pool, "")) for pool in pools]
    picks = calibration.collect_picks(pools, values)
    assert picks.expected_labels(fitted).mean() == pytest.approx(picks.labels.mean(), abs=0.02)
    by_score = fit(*held)
    assert by_score is not None
    assert abs(picks.expected_labels(by_score).mean() - picks.labels.mean()) > 0.05


def test_of_several_candidates_one_is_the_greedy_response_where_the_selector_knows_it() -> None:
    """The selector picks the greedy response, so that more candidates change nothing."""
    by_greedy = Selector(
        rules=(Rule(features=("score", "mbr", "greedy"), weights=(0.0, 0.0, 1.0)),), decoding="g greedy"
    )
    pools, scores = uneven(200, 8, seed=1)
    pools = [
        replace(
            pool,
            candidates=tuple(
                replace(each, generator="g", decoding="greedy" if place == 3 else "topp")
                for place, each in enumerate(pool.candidates)
            ),
        )
        for pool in pools
    ]
    fitted = calibration.fit(scored(pools, scores), [by_greedy] * len(pools), "rougeL", seed=0)
    assert fitted is not None
    greedy_scores = [own[3] for own in scores]
    expected = np.mean([pool.labels[3] for pool in pools])
    for n in (2, 4, 8):
        assert np.mean(fitted.apply(greedy_scores, n=n)) == pytest.approx(expected, abs=1e-6)


def test_an_n_that_few_groups_reach_has_no_map_of_its_own() -> None:
    labels = [RNG.random(3) for _ in range(30)] + [RNG.random(50) for _ in range(calibration.MIN_GROUPS - 1)]
    fitted = fit(pools_of(labels), [RNG.random(len(own)) for own in labels])
    assert fitted is not None
    assert [one.n for one in fitted.maps] == [1, 2, 3]


def test_the_report_calibrates_each_parts_picks_by_its_own_map() -> None:
    parts = [uneven(50, 4, seed=seed) for seed in (6, 7)]
    picks = [picks_of(*part) for part in parts]
    maps = [straight({1: 0.2}), straight({1: 0.8})]
    result = calibration.measure_calibration(list(zip(picks, maps, strict=True)))
    both = np.concatenate([own.expected_labels(fitted) for own, fitted in zip(picks, maps, strict=True)])
    labels = np.concatenate([own.labels for own in picks])
    assert result.calibrated == calibration.measure_reliability(both, labels)
    assert result.fitted_on == 160
    lacking = calibration.measure_calibration([(picks[0], maps[0]), (picks[1], None)])
    assert (lacking.calibrated, lacking.fitted_on) == (None, 0)
    assert lacking.raw == result.raw


def test_a_map_goes_to_a_folder_and_back(tmp_path: Path) -> None:
    result = fit(*uneven(50, 4, seed=8))
    assert result is not None
    assert read_calibration(tmp_path) is None
    (tmp_path / "calibration.json").write_text(result.to_json())
    assert read_calibration(tmp_path) == result


POINTS: dict[str, Any] = {"n": 1, "scores": [0, 1], "expected": [0, 1]}
DAMAGED: list[dict[str, Any]] = [
    {"n": 2},
    {"n": 1.5},
    {"n": True},
    {"scores": []},
    {"scores": [0]},
    {"expected": [0.9, 0.1]},
    {"expected": [0.9, 1.1]},
    {"scores": [1, 0]},
    {"scores": [0, float("nan")]},
]


@pytest.mark.parametrize(
    "damage",
    [
        {"kind": "magic"},
        {"metric": None, "fitted_on": "x"},
        {"maps": []},
        {"maps": [POINTS, POINTS]},
        {"maps": "no"},
        *({"maps": [{**POINTS, **own}]} for own in DAMAGED),
    ],
)
def test_a_damaged_map_is_refused(tmp_path: Path, damage: dict[str, object]) -> None:
    values = json.loads(straight({1: 1.0, 8: 0.5}).to_json())
    (tmp_path / "calibration.json").write_text(json.dumps({**values, **damage}))
    with raises_naming(FolderError, "calibration.json", "not a calibration", "evaluate again"):
        read_calibration(tmp_path)


def test_a_map_of_all_candidates_by_an_older_version_is_refused_as_it_overrates_picks(tmp_path: Path) -> None:
    older = {"kind": "isotonic", "metric": "rougeL", "fitted_on": 99, "scores": [0, 1], "expected": [0, 1]}
    (tmp_path / "calibration.json").write_text(json.dumps(older))
    with raises_naming(FolderError, "older version", "all candidates", "evaluate again", "delete it"):
        read_calibration(tmp_path)


def test_answering_the_surest_half_is_better_than_answering_all() -> None:
    result = calibration.measure_coverage(SCORES.tolist(), SCORES)
    assert result.quality[-1] == pytest.approx(result.random) == pytest.approx(SCORES.mean())
    assert list(result.quality) == sorted(result.quality, reverse=True)
    assert result.quality[4] == pytest.approx(np.sort(SCORES)[2000:].mean())
