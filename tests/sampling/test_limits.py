"""A budget is one for all the processes of a run, also while they run."""

import contextlib
import threading
import time
from pathlib import Path

import pytest

from cappy.errors import GeneratorError
from cappy.sampling.endpoint.limits import REFRESH_SECONDS, Budget, Spent, StoppedError
from cappy.sampling.generators import EndpointConfig

ONE = Spent(requests=1, input_tokens=2, output_tokens=3)


def spend(budget: Budget, times: int = 1) -> None:
    for _ in range(times):
        with budget.hold(ONE, threading.Event()) as spent:
            spent.add(ONE)


def test_what_another_process_spends_is_seen_while_this_one_runs(tmp_path: Path) -> None:
    terms = EndpointConfig(folder=tmp_path, run="r", budget_requests=5)
    mine, other = Budget("mine", terms), Budget("other", terms)
    spend(mine)
    spend(other, 4)
    time.sleep(REFRESH_SECONDS + 0.1)
    with pytest.raises(GeneratorError, match=r"5 requests.*\(0 left.*--budget-requests"):
        spend(mine)
    mine.close()
    other.close()


def test_an_earlier_start_counts_and_another_run_does_not(tmp_path: Path) -> None:
    first = Budget("m", EndpointConfig(folder=tmp_path, run="r"))
    spend(first, 3)
    first.close()
    spend(Budget("m", EndpointConfig(folder=tmp_path, run="other", budget_tokens=5)))
    with pytest.raises(GeneratorError, match="19 tokens.*--budget-tokens"):
        spend(Budget("m", EndpointConfig(folder=tmp_path, run="r", budget_tokens=19)))
    spend(Budget("m", EndpointConfig(folder=tmp_path, run="r", budget_tokens=20)))


def test_whoever_finds_the_budget_used_up_ends_the_run() -> None:
    budget, stop = Budget("m", EndpointConfig(budget_requests=1)), threading.Event()
    spend(budget)
    with pytest.raises(GeneratorError, match="--budget-requests"), budget.hold(ONE, stop):
        pass
    assert stop.is_set()


def test_what_is_under_way_is_held_back_and_given_back_if_it_was_not_answered() -> None:
    budget, stop = Budget("m", EndpointConfig(budget_requests=1)), threading.Event()
    passed = threading.Event()

    def other() -> None:
        with contextlib.suppress(StoppedError), budget.hold(ONE, stop):
            passed.set()

    thread = threading.Thread(target=other, daemon=True)
    with budget.hold(ONE, stop):
        thread.start()
        assert not passed.wait(0.3)
    thread.join(10)
    stop.set()
    assert passed.is_set()
