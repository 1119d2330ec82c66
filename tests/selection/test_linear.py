"""The fitted selector picks by what is known, is never worse than its best feature, and keeps what was fitted."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cappy.errors import ConfigError, FolderError
from cappy.records import Candidate, Instance
from cappy.selection import Candidates, Selector, read_selector, require_selector
from cappy.selection.fitting import MIN_GROUPS, fit_selector, out_of_fold_selectors
from cappy.selection.linear import (
    SELECTOR,
    Feature,
    PoolFeatures,
    Rule,
    features_of,
    parse_selector,
)
from cappy.selection.pools import Pool, pick_label

GREEDY = "g greedy"


def pools_of(
    count: int, *, useful: str, size: int = 6, seed: int = 0, noise: float = 0.5, likelihoods: bool = True
) -> list[Pool]:
    """Pools whose labels follow one feature or several, with noise; the first candidate is the greedy response."""
    rng = np.random.default_rng(seed)
    pools = []
    for number in range(count):
        score, likelihood = rng.normal(size=size), rng.normal(size=size)
        is_greedy = np.arange(size) == 0
        signal = {
            "score": score,
            "likelihood": likelihood,
            "greedy": 3.0 * is_greedy,
            "both": score + likelihood,
            "none": np.zeros(size),
        }[useful]
        labels = 1 / (1 + np.exp(-(signal + noise * rng.normal(size=size))))
        candidates = tuple(
            Candidate(
                response=f"{number} {index}",
                generator="g",
                decoding="greedy" if index == 0 else "topp",
                logprob_mean=float(likelihood[index]) if likelihoods else None,
                labels={"rougeL": float(labels[index])},
            )
            for index in range(size)
        )
        instance = Instance(
            instance_id=str(number), group_id=str(number), instruction="i", references=("r",), candidates=candidates
        )
        pools.append(Pool(instance, candidates, labels, {"scorer": 1 / (1 + np.exp(-score))}))
    return pools


def mean_label(selector: Selector, pools: Sequence[Pool], without: frozenset[Any] = frozenset()) -> float:
    known = [features_of(pool, GREEDY).without(without) for pool in pools]
    return float(
        np.mean([pick_label(selector.values(each), pool.labels) for each, pool in zip(known, pools, strict=True)])
    )


def fitted(pools: Sequence[Pool]) -> Selector:
    return fit_selector(pools, metric="rougeL", evidence="held-out", scorer="abc")


@pytest.mark.parametrize("useful", ["score", "likelihood", "greedy"])
def test_where_one_feature_decides_it_picks_by_that_one(useful: str) -> None:
    selector, tested = fitted(pools_of(200, useful=useful)), pools_of(300, useful=useful, seed=1)
    single = {
        "score": Selector(),
        "likelihood": Selector(rules=(Rule(features=("score", "likelihood"), weights=(0.0, 1.0)),)),
        "greedy": Selector(rules=(Rule(features=("score", "mbr", "greedy"), weights=(0.0, 0.0, 1.0)),)),
    }[useful]
    assert mean_label(selector, tested) > mean_label(single, tested) - 0.01


def test_where_two_features_help_it_is_better_than_each() -> None:
    selector, tested = fitted(pools_of(200, useful="both")), pools_of(300, useful="both", seed=1)
    rule = selector.rule(frozenset({"score", "likelihood"}))
    assert rule.gain > rule.standard_error > 0
    assert min(rule.used[name] for name in ("score", "likelihood")) > 0.5
    assert mean_label(selector, tested) > mean_label(Selector(), tested) + 0.05


def test_without_likelihoods_or_the_greedy_response_it_picks_by_the_rule_for_what_is_left() -> None:
    selector = fitted(pools_of(200, useful="both"))
    pool = features_of(pools_of(1, useful="both", seed=5)[0], GREEDY)
    lacking: tuple[frozenset[Feature], ...] = (
        frozenset({"likelihood"}),
        frozenset({"greedy"}),
        frozenset({"likelihood", "greedy"}),
    )
    for without in lacking:
        known = pool.without(without)
        assert set(selector.rule(known.available).features) == set(known.available)
    closed = replace(pool, closed_choices=True)
    assert selector.rule(closed.available).features == ("score", "likelihood")


def test_a_gain_within_a_standard_error_leaves_the_best_single_feature() -> None:
    rules = [fitted(pools_of(60, useful="none", seed=seed)).rules for seed in range(8)]
    singles = [rule.single is not None for each in rules for rule in each]
    assert np.mean(singles) > 0.7
    for rule in (rule for each in rules for rule in each if rule.single is None):
        assert rule.gain > rule.standard_error


def test_no_feature_gets_a_weight_below_zero_even_if_it_seems_to_hurt() -> None:
    pools = pools_of(120, useful="likelihood", noise=0.1)
    opposed = [replace(pool, scores={"scorer": pool.scores["scorer"] - pool.labels}) for pool in pools]
    for rule in fitted(opposed).rules:
        assert min(rule.weights) >= 0, rule


def test_picks_of_held_out_pools_are_those_of_a_selector_of_other_groups() -> None:
    pools = pools_of(60, useful="both")
    selectors = out_of_fold_selectors(pools, metric="rougeL")
    assert selectors is not None
    assert len(set(map(str, selectors))) == 5
    for pool, selector in zip(pools, selectors, strict=True):
        changed = [replace(each, labels=1 - each.labels) if each is pool else each for each in pools]
        again = out_of_fold_selectors(changed, metric="rougeL")
        assert again is not None
        assert again[pools.index(pool)] == selector, "its own labels do not matter"
        if pools.index(pool) == 2:
            break
    assert out_of_fold_selectors(pools_of(24, useful="both"), metric="rougeL") is None


def test_too_few_groups_or_pools_without_a_feature_leave_what_is_known() -> None:
    few = fitted(pools_of(MIN_GROUPS - 1, useful="both"))
    assert few.rules == Selector().rules
    assert few.evidence is None
    without = fitted(pools_of(80, useful="score", likelihoods=False))
    assert {rule.features for rule in without.rules} == {("score",), ("score", "mbr"), ("score", "mbr", "greedy")}
    assert Selector().rule(frozenset({"score", "mbr"})).text == "score"


def test_fitting_is_deterministic_and_does_not_depend_on_the_order_of_pools() -> None:
    pools = pools_of(80, useful="both")
    first, reversed_ = fitted(pools), fitted(pools[::-1])
    assert fitted(pools) == first
    for rule, other in zip(first.rules, reversed_.rules, strict=True):
        assert other.weights == pytest.approx(rule.weights, abs=1e-3)


@given(
    scores=st.lists(st.floats(0, 1), min_size=1, max_size=8),
    shift=st.floats(-1, 1),
    unit=st.floats(0.1, 10),
    data=st.data(),
)
def test_a_pick_does_not_depend_on_the_unit_of_the_likelihood(
    scores: list[float], shift: float, unit: float, data: st.DataObject
) -> None:
    likelihoods = data.draw(st.lists(st.floats(-9, 0), min_size=len(scores), max_size=len(scores)))
    selector = Selector(rules=(Rule(features=("score", "likelihood"), weights=(0.3, 2.0)),))
    candidates = Candidates(responses=[str(index) for index in range(len(scores))], closed_choices=True)
    values = selector.values(replace(candidates, likelihoods=likelihoods).with_scores(scores))
    other = [unit * each + shift for each in likelihoods]
    scaled = selector.values(replace(candidates, likelihoods=other).with_scores(scores))
    if np.ptp(likelihoods) > 1e-6 or np.ptp(likelihoods) == 0:
        assert scaled == pytest.approx(values, abs=1e-4)


def test_of_equal_values_the_higher_logit_then_the_first_is_picked() -> None:
    candidates = Candidates(responses=["a", "b", "c"])
    assert Selector().rank(candidates.with_scores([1.0, 1.0, 0.5], [30.0, 40.0, 0.0])).order == (1, 0, 2)
    assert Selector().rank(candidates.with_scores([0.5, 1.0, 1.0])).order == (1, 2, 0)
    assert Selector().rank(Candidates(responses=["a"], greedy=0).with_scores([0.1])).picked == 0


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"responses": []}, "no responses"),
        ({"likelihoods": [-1.0]}, "there are 1 for 2 responses"),
        ({"likelihoods": [-1.0, float("nan")]}, "log-probabilities"),
        ({"likelihoods": [-1.0, -1e200]}, "log-probabilities"),
        ({"greedy": 2}, "0 to 1, got 2"),
        ({"greedy": -1}, "0 to 1, got -1"),
    ],
)
def test_what_does_not_fit_the_responses_is_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Candidates(**{"responses": ["a", "b"], **fields})


def test_selector_json_gives_the_same_selector_back(tmp_path: Path) -> None:
    selector = fitted(pools_of(80, useful="both"))
    (tmp_path / SELECTOR).write_text(selector.to_json())
    assert read_selector(tmp_path, "abc") == selector
    with pytest.raises(FolderError, match="belongs to the scorer abc, not to def"):
        read_selector(tmp_path, "def")


def test_a_folder_without_a_selector_means_the_score_alone(tmp_path: Path) -> None:
    assert read_selector(tmp_path, "abc") == Selector()
    with pytest.raises(ConfigError, match="has no selector.json"):
        require_selector(tmp_path, "abc")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        json.dumps({"rules": [{"features": ["score"], "weights": []}]}),
        json.dumps({"rules": [{"features": ["taste"], "weights": [1.0]}]}),
        json.dumps({"rules": [{"features": ["score"], "weights": [1.0], "scales": [0.0]}]}),
        '{"rules": [{"features": ["score"], "weights": [NaN]}]}',
    ],
)
def test_a_damaged_selector_is_refused_with_its_remedy(tmp_path: Path, text: str) -> None:
    (tmp_path / SELECTOR).write_text(text)
    with pytest.raises(FolderError, match="selector.json: is not a selector .*; evaluate again, or delete it"):
        read_selector(tmp_path)


def test_values_in_units_of_the_label_predict_the_differences_of_labels() -> None:
    pools, tested = pools_of(300, useful="both"), pools_of(300, useful="both", seed=1)
    selector = fitted(pools)
    predicted, actual = [], []
    for pool in tested:
        values = selector.label_values(features_of(pool, GREEDY))
        assert values is not None
        predicted.append(values - values.mean())
        actual.append(pool.labels - pool.labels.mean())
    slope = np.polyfit(np.concatenate(predicted), np.concatenate(actual), 1)[0]
    assert 0.8 < slope < 1.2
    assert Selector().label_values(features_of(tested[0], GREEDY)) is None


def test_unknown_features_are_refused() -> None:
    with pytest.raises(ValueError, match="rules"):
        parse_selector({"rules": [{"features": ["score", "embedding"], "weights": [1.0, 1.0]}]})


def test_features_are_those_of_the_pool_in_the_order_of_the_rule() -> None:
    pool = PoolFeatures(responses=["a b", "a c", "z"], scores=np.array([0.1, 0.2, 0.9]), greedy=1)
    matrix = pool.matrix(("greedy", "score"))
    assert matrix[:, 0].tolist() == [0.0, 1.0, 0.0]
    assert matrix[:, 1].mean() == pytest.approx(0.0)
    assert matrix[:, 1].std() == pytest.approx(1.0)


@pytest.mark.parametrize("unknown", [None, float("nan"), float("-inf"), 1e300])
def test_a_likelihood_that_is_no_log_probability_is_refused(unknown: Any) -> None:
    with pytest.raises(ConfigError, match="likelihoods: must be log-probabilities"):
        Candidates(responses=["a", "b"], likelihoods=[-1.0, unknown])


def test_an_index_of_a_truncated_response_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="truncated: must be indices of responses, 0 to 1, got 2"):
        Candidates(responses=["a", "b"], truncated=[2])
