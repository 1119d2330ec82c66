"""What limits on tokens and money leave room for."""

from hypothesis import given
from hypothesis import strategies as st

from serving.gateway.config import SpendingLimits
from serving.gateway.policy import Ledger, Prices, RemainingBudget, Total, allow

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
    found = allow(wanted, budgets, prices, prompt_tokens=prompt, need=need, first=first)
    assert 0 <= found.count <= wanted
    for budget in budgets if found.count else ():
        if budget.limit == "tokens":
            assert found.most_tokens is not None
            assert found.count * found.most_tokens <= budget.left
        else:
            cost = found.count * prices.cost(prompt, found.most_tokens or 0)
            assert cost <= budget.left + 1e-9
    if found.count and found.most_tokens is not None:
        assert found.most_tokens >= (min(need, 16) if first and found.count == 1 else need)
    if not found.count:
        assert found.limit in {budget.limit for budget in budgets}


@given(st.integers(1, 16), BUDGETS, PRICES, st.integers(0, 500), st.integers(1, 500))
def test_as_many_are_allowed_as_there_is_room_for(
    wanted: int, budgets: list[RemainingBudget], prices: Prices, prompt: int, need: int
) -> None:
    found = allow(wanted, budgets, prices, prompt_tokens=prompt, need=need, first=False)
    if found.count < wanted:
        more = found.count + 1
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
    found = allow(8, [], Prices(), prompt_tokens=10, need=256, first=True)
    assert (found.count, found.most_tokens, found.limit) == (8, None, None)


def test_what_a_call_may_cost_is_kept_from_others_until_it_is_settled() -> None:
    total = Total()
    one, other = (Ledger(SpendingLimits(max_total_cost=1.0), total) for _ in range(2))
    one.hold(0.75)
    assert [budget.left for budget in other.budgets()] == [0.25]
    one.settle(0.75, 10, 5, 0.125)
    assert [budget.left for budget in other.budgets()] == [0.875]


def test_a_call_that_may_have_been_paid_for_is_charged_with_the_most_and_any_other_with_nothing() -> None:
    total = Total()
    ledger = Ledger(SpendingLimits(max_cost=1.0), total)
    for paid in (True, False):
        ledger.hold(0.25)
        ledger.fail(0.25, paid=paid)
    assert (total.spent, total.held) == (0.25, 0.0)
    assert (ledger.cost, ledger.failed, ledger.unmetered) == (0.0, 2, 1)
    assert [budget.left for budget in ledger.budgets()] == [0.75]
