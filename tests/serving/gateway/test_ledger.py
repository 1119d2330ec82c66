"""What limits on tokens and money leave room for."""

from hypothesis import given
from hypothesis import strategies as st

from serving.gateway.ledger import Ledger, Limits, Prices, Purse, Total, allow

PRICES = st.builds(Prices, prompt=st.integers(0, 1000).map(float), completion=st.integers(0, 1000).map(float))
PURSES = st.lists(
    st.one_of(
        st.builds(Purse, st.just("tokens"), st.integers(-10, 5000)),
        st.builds(Purse, st.sampled_from(["money", "total-money"]), st.integers(-10, 5000).map(lambda n: n / 1000)),
    ),
    max_size=3,
)


@given(st.integers(1, 16), PURSES, PRICES, st.integers(0, 500), st.integers(1, 500), st.booleans())
def test_what_is_allowed_fits_into_every_purse(
    wanted: int, purses: list[Purse], prices: Prices, prompt: int, need: int, first: bool
) -> None:
    found = allow(wanted, purses, prices, prompt_tokens=prompt, need=need, first=first)
    assert 0 <= found.count <= wanted
    for purse in purses if found.count else ():
        if purse.limit == "tokens":
            assert found.most_tokens is not None
            assert found.count * found.most_tokens <= purse.left
        else:
            cost = found.count * prices.cost(prompt, found.most_tokens or 0)
            assert cost <= purse.left + 1e-9
    if found.count and found.most_tokens is not None:
        assert found.most_tokens >= (min(need, 16) if first and found.count == 1 else need)
    if not found.count:
        assert found.limit in {purse.limit for purse in purses}


@given(st.integers(1, 16), PURSES, PRICES, st.integers(0, 500), st.integers(1, 500))
def test_as_many_are_allowed_as_there_is_room_for(
    wanted: int, purses: list[Purse], prices: Prices, prompt: int, need: int
) -> None:
    found = allow(wanted, purses, prices, prompt_tokens=prompt, need=need, first=False)
    if found.count < wanted:
        more = found.count + 1
        short = [
            purse
            for purse in purses
            if (
                more * need > purse.left - 1e-9
                if purse.limit == "tokens"
                else more * prices.cost(prompt, need) > purse.left - 1e-6
            )
        ]
        assert short


def test_without_a_limit_all_are_allowed_at_any_length() -> None:
    found = allow(8, [], Prices(), prompt_tokens=10, need=256, first=True)
    assert (found.count, found.most_tokens, found.limit) == (8, None, None)


def test_what_a_call_may_cost_is_kept_from_others_until_it_is_settled() -> None:
    total = Total()
    one, other = (Ledger(Limits(total_money=1.0), total) for _ in range(2))
    one.hold(0.75)
    assert [purse.left for purse in other.purses()] == [0.25]
    one.settle(0.75, 10, 5, 0.125)
    assert [purse.left for purse in other.purses()] == [0.875]


def test_a_call_that_may_have_been_paid_for_is_charged_with_the_most_and_any_other_with_nothing() -> None:
    total = Total()
    ledger = Ledger(Limits(money=1.0), total)
    for paid in (True, False):
        ledger.hold(0.25)
        ledger.fail(0.25, paid=paid)
    assert (total.spent, total.held) == (0.25, 0.0)
    assert (ledger.cost, ledger.failed, ledger.unmetered) == (0.0, 2, 1)
    assert [purse.left for purse in ledger.purses()] == [0.75]
