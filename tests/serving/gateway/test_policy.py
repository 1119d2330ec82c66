"""When sampling stops: properties of the expected gain and of the decision."""

import math
import random
import statistics

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import integrate, stats
from wording import raises_naming

from cappy.errors import ConfigError
from serving.gateway.config import Policy
from serving.gateway.policy import decide, expected_gain

# Scores on a grid, so that rounding is far below what is compared.
SCORE = st.integers(0, 1000).map(lambda number: number / 1000)
COARSE = st.integers(0, 10).map(lambda number: number / 10)
SCORES = st.lists(SCORE, min_size=3, max_size=30)


@given(SCORES)
def test_the_gain_is_the_integral_that_it_stands_for(scores: list[float]) -> None:
    assume(len(set(scores)) > 1)
    spread = statistics.stdev(scores) * math.sqrt(1 + 1 / len(scores))
    next_score = stats.t(len(scores) - 1, loc=sum(scores) / len(scores), scale=spread)
    best = max(scores)
    tail, _ = integrate.quad(lambda excess: next_score.sf(best + excess), 0, math.inf, limit=200)
    assert expected_gain(scores) == pytest.approx(tail, rel=1e-4, abs=1e-9)


def test_the_gain_is_near_what_another_sample_brings_and_errs_on_the_side_of_sampling() -> None:
    rng = random.Random(0)
    told = brought = 0.0
    for _ in range(8000):
        scores = [rng.gauss(0.5, 0.1) for _ in range(8)]
        told += expected_gain(scores)
        brought += max(0.0, rng.gauss(0.5, 0.1) - max(scores))
    assert brought < told < 1.5 * brought


@given(SCORES, st.randoms(use_true_random=False), st.integers(-5, 5), st.integers(1, 8))
def test_the_gain_knows_no_order_no_zero_and_scales_with_the_unit(
    scores: list[float], rng: random.Random, shift: int, unit: int
) -> None:
    gain = expected_gain(scores)
    assert gain >= 0
    shuffled = rng.sample(scores, len(scores))
    assert expected_gain(shuffled) == pytest.approx(gain, rel=1e-6, abs=1e-12)
    assert expected_gain([unit * score + shift for score in scores]) == pytest.approx(unit * gain, rel=1e-6, abs=1e-9)


@given(st.lists(SCORE, max_size=2))
def test_fewer_than_three_scores_say_nothing_of_the_gain(scores: list[float]) -> None:
    assert expected_gain(scores) == math.inf


@given(SCORE, st.integers(3, 20))
def test_equal_scores_promise_nothing(score: float, count: int) -> None:
    assert expected_gain([score] * count) == 0


@given(SCORES)
def test_what_was_seen_twice_promises_less_than_what_was_seen_once(scores: list[float]) -> None:
    assume(len(set(scores)) > 1)
    assert expected_gain(scores * 2) < expected_gain(scores)


POLICIES = st.builds(
    Policy,
    candidates=st.integers(1, 20),
    round_size=st.integers(1, 20),
    threshold=st.none() | COARSE,
    min_gain=st.sampled_from([0.0, 0.01, 0.1]),
)


@given(POLICIES, st.lists(COARSE, min_size=20, max_size=20), st.integers(1, 20))
def test_rounds_end_at_the_first_reason_and_never_ask_for_more_than_allowed(
    policy: Policy, stream: list[float], wanted: int
) -> None:
    wanted = min(wanted, policy.candidates)
    seen: list[float] = []
    while True:
        found = decide(policy, seen, asked=len(seen), drawn=len(seen), wanted=wanted, most=policy.candidates)
        enough = policy.threshold is not None and bool(seen) and max(seen) >= policy.threshold
        if found.stop:
            break
        assert len(seen) < wanted or not enough
        assert 0 < found.count <= max(policy.round_size, wanted)
        seen += stream[len(seen) : len(seen) + found.count]
        assert len(seen) <= policy.candidates
    assert found.count == 0
    assert len(seen) >= wanted
    expected = {"threshold": enough, "gain": expected_gain(seen) < policy.min_gain}
    assert expected.get(found.stop, len(seen) == policy.candidates)


@given(SCORES)
def test_no_least_gain_never_stops_and_an_endless_one_always_does(scores: list[float]) -> None:
    at = {"asked": len(scores), "drawn": len(scores), "wanted": 1, "most": len(scores) + 1}
    assert decide(Policy(min_gain=0), scores, **at).count == 1
    assert decide(Policy(min_gain=math.inf), scores, **at).stop == "gain"


def test_choices_that_are_wanted_and_failed_are_made_up_for_however_good_the_others_are() -> None:
    policy = Policy(candidates=8, round_size=1, threshold=0.5)
    assert decide(policy, [0.9], asked=3, drawn=1, wanted=3, most=8).count == 2
    assert decide(policy, [0.9] * 3, asked=5, drawn=3, wanted=3, most=8).stop == "threshold"


def test_a_score_that_equals_the_threshold_is_enough() -> None:
    assert decide(Policy(threshold=0.5), [0.5], asked=1, drawn=1, wanted=1, most=8).stop == "threshold"


def test_a_floor_above_the_threshold_is_refused() -> None:
    with raises_naming(ConfigError, "--floor 0.9", "--threshold 0.5", "lower --floor"):
        Policy(threshold=0.5, floor=0.9)
