"""When sampling stops: the expected gain and the decision, and what limits on tokens and money leave room for."""

import math
import random
import statistics

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import integrate, stats
from wording import raises_naming

from cappy.errors import ConfigError
from serving.gateway.config import Policy, SpendingLimits
from serving.gateway.policy import Ledger, Prices, RemainingBudget, TotalCost, allow, decide, expected_gain

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
    actual = brought = 0.0
    for _ in range(8000):
        scores = [rng.gauss(0.5, 0.1) for _ in range(8)]
        actual += expected_gain(scores)
        brought += max(0.0, rng.gauss(0.5, 0.1) - max(scores))
    assert brought < actual < 1.5 * brought


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
        result = decide(
            policy,
            seen,
            num_requested=len(seen),
            num_received=len(seen),
            min_candidates=wanted,
            max_candidates=policy.candidates,
        )
        enough = policy.threshold is not None and bool(seen) and max(seen) >= policy.threshold
        if result.stop:
            break
        assert len(seen) < wanted or not enough
        assert 0 < result.count <= max(policy.round_size, wanted)
        seen += stream[len(seen) : len(seen) + result.count]
        assert len(seen) <= policy.candidates
    assert result.count == 0
    assert len(seen) >= wanted
    expected = {"threshold": enough, "gain": expected_gain(seen) < policy.min_gain}
    assert expected.get(result.stop, len(seen) == policy.candidates)


@given(SCORES)
def test_no_least_gain_never_stops_and_an_endless_one_always_does(scores: list[float]) -> None:
    at = {
        "num_requested": len(scores),
        "num_received": len(scores),
        "min_candidates": 1,
        "max_candidates": len(scores) + 1,
    }
    assert decide(Policy(min_gain=0), scores, **at).count == 1
    assert decide(Policy(min_gain=math.inf), scores, **at).stop == "gain"


def test_choices_that_are_wanted_and_failed_are_made_up_for_however_good_the_others_are() -> None:
    policy = Policy(candidates=8, round_size=1, threshold=0.5)
    assert decide(policy, [0.9], num_requested=3, num_received=1, min_candidates=3, max_candidates=8).count == 2
    assert (
        decide(policy, [0.9] * 3, num_requested=5, num_received=3, min_candidates=3, max_candidates=8).stop
        == "threshold"
    )


def test_a_score_that_equals_the_threshold_is_enough() -> None:
    assert (
        decide(Policy(threshold=0.5), [0.5], num_requested=1, num_received=1, min_candidates=1, max_candidates=8).stop
        == "threshold"
    )


def test_a_floor_above_the_threshold_is_refused() -> None:
    with raises_naming(ConfigError, "--floor 0.9", "--threshold 0.5", "lower --floor"):
        Policy(threshold=0.5, floor=0.9)


PRICES = st.builds(Prices, input=st.integers(0, 1000).map(float), output=st.integers(0, 1000).map(float))
BUDGETS = st.lists(
    st.one_of(
        st.builds(RemainingBudget, st.just("tokens"), st.integers(-10, 5000)),
        st.builds(
            RemainingBudget, st.sampled_from(["money", "total-money"]), st.integers(-10, 5000).map(lambda n: n / 1000)
        ),
    ),
    max_size=3,
)


@given(st.integers(1, 16), BUDGETS, PRICES, st.integers(0, 500), st.integers(1, 500), st.booleans())
def test_what_is_allowed_fits_into_every_budget(
    wanted: int, budgets: list[RemainingBudget], prices: Prices, prompt: int, need: int, first: bool
) -> None:
    result = allow(wanted, budgets, prices, prompt_tokens=prompt, min_tokens=need, first=first)
    assert 0 <= result.count <= wanted
    for budget in budgets if result.count else ():
        if budget.limit == "tokens":
            assert result.max_tokens is not None
            assert result.count * result.max_tokens <= budget.left
        else:
            cost = result.count * prices.cost(prompt, result.max_tokens or 0)
            assert cost <= budget.left + 1e-9
    if result.count and result.max_tokens is not None:
        assert result.max_tokens >= (min(need, 16) if first and result.count == 1 else need)
    if not result.count:
        assert result.limit in {budget.limit for budget in budgets}


@given(st.integers(1, 16), BUDGETS, PRICES, st.integers(0, 500), st.integers(1, 500))
def test_as_many_are_allowed_as_the_limits_permit(
    wanted: int, budgets: list[RemainingBudget], prices: Prices, prompt: int, need: int
) -> None:
    result = allow(wanted, budgets, prices, prompt_tokens=prompt, min_tokens=need, first=False)
    if result.count < wanted:
        more = result.count + 1
        short = [
            budget
            for budget in budgets
            if (
                more * need > budget.left - 1e-9
                if budget.limit == "tokens"
                else more * prices.cost(prompt, need) > budget.left - 1e-6
            )
        ]
        assert short


def test_without_a_limit_all_are_allowed_at_any_length() -> None:
    result = allow(8, [], Prices(), prompt_tokens=10, min_tokens=256, first=True)
    assert (result.count, result.max_tokens, result.limit) == (8, None, None)


def test_what_a_call_may_cost_is_kept_from_others_until_it_is_settled() -> None:
    total = TotalCost()
    one, other = (Ledger(SpendingLimits(max_total_cost=1.0), total) for _ in range(2))
    one.reserve(0.75)
    assert [budget.left for budget in other.budgets()] == [0.25]
    one.settle(0.75, 10, 5, 0.125)
    assert [budget.left for budget in other.budgets()] == [0.875]


def test_a_call_that_may_have_been_paid_for_is_charged_with_the_most_and_any_other_with_nothing() -> None:
    total = TotalCost()
    ledger = Ledger(SpendingLimits(max_cost=1.0), total)
    for may_be_billed in (True, False):
        ledger.reserve(0.25)
        ledger.fail(0.25, may_be_billed=may_be_billed)
    assert (total.spent, total.reserved) == (0.25, 0.0)
    assert (ledger.cost, ledger.failed, ledger.unmetered) == (0.0, 2, 1)
    assert [budget.left for budget in ledger.budgets()] == [0.75]
