"""Batches of concurrent requests: whole, in turn, within the budget, and no score lost, invented or exchanged."""

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scoring_function import FakeEngine, lengths

from cappy.scoring.encoding import EncodedPair, Pair
from serving.bodies import Refusal
from serving.engine import Batch, Batcher, _Job, take_batch

Pools = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=12), min_size=1, max_size=6)


def job(engine: FakeEngine, sizes: Sequence[int]) -> _Job:
    pairs = [EncodedPair(ids=(0,) * size, types=()) for size in sizes]
    waiting = sorted(enumerate(pairs), key=lambda one: len(one[1].ids))
    return _Job(engine, waiting, [], len(pairs), None)  # type: ignore[arg-type]


def emptied(jobs: "deque[_Job]", budget: int) -> list[Batch]:
    batches = []
    while batch := take_batch(jobs, budget):
        batches.append(batch)
        assert len(batches) < 1000
    return batches


@given(Pools, st.integers(1, 100), st.booleans())
def test_every_pair_is_in_one_batch_and_batches_keep_to_the_budget(
    pools: list[list[int]], budget: int, pads: bool
) -> None:
    engine = FakeEngine(pads=pads)
    jobs = deque(job(engine, pool) for pool in pools)
    numbered = {id(one): number for number, one in enumerate(jobs)}
    batches = emptied(jobs, budget)
    seen = sorted((numbered[id(one)], index) for batch in batches for one, index, _ in batch)
    assert seen == [(number, index) for number, pool in enumerate(pools) for index in range(len(pool))]
    for batch in batches:
        sizes = [len(pair.ids) for _, _, pair in batch]
        cost = max(sizes) * len(sizes) if pads else sum(sizes)
        assert cost <= budget or len(sizes) == 1


def test_a_request_of_one_pair_is_in_the_next_batch_behind_one_of_500() -> None:
    engine = FakeEngine()
    large, small = job(engine, [10] * 500), job(engine, [10])
    jobs = deque([large])
    take_batch(jobs, 100)
    jobs.append(small)
    assert small in [one for one, _, _ in take_batch(jobs, 100)]


def test_a_long_pair_does_not_wait_for_ever_behind_short_ones() -> None:
    engine = FakeEngine()
    jobs = deque([job(engine, [10] * 50), job(engine, [95])])
    batches = emptied(jobs, 100)
    assert any(len(pair.ids) == 95 for batch in batches[:2] for _, _, pair in batch)


def test_a_batch_holds_pairs_of_one_engine_alone() -> None:
    old, new = FakeEngine(), FakeEngine()
    batches = emptied(deque([job(old, [5, 5]), job(new, [5, 5]), job(old, [5])]), 100)
    assert [{id(one.engine) for one, _, _ in batch} for batch in batches] == [{id(old)}, {id(new)}]


def pairs(count: int, text: str = "x") -> list[Pair]:
    return [(text, str(number)) for number in range(count)]


def during(work: Any, **settings: Any) -> Any:
    """Runs work(batcher) beside the batcher's own loop."""

    async def main() -> Any:
        batcher = Batcher(**{"batch_tokens": 40, "max_queued_tokens": 10_000, **settings})
        running = asyncio.create_task(batcher.run())
        try:
            return await asyncio.wait_for(work(batcher), 20)
        finally:
            running.cancel()
            batcher.close()

    return asyncio.run(main())


def test_concurrent_requests_get_their_own_scores_in_their_order() -> None:
    engine = FakeEngine(delay=0.001)

    async def work(batcher: Batcher) -> None:
        pools = [[(str(number) * number, "r" * size) for size in (3, 1, 2, 3)] for number in range(1, 9)]
        answers = await asyncio.gather(*(batcher.score(engine, pool) for pool in pools))
        for pool, (computed, *_) in zip(pools, answers, strict=True):
            assert [score for score, _ in computed] == [lengths(pair) for pair in pool]
            assert [logit for _, logit in computed] == [10 * lengths(pair) for pair in pool]
        assert batcher.queued_tokens == 0

    during(work)
    assert any(len({pair[0] for pair in batch}) > 1 for batch in engine.batches), "of several requests"
    computed = [pair for batch in engine.batches for pair in batch]
    assert len(computed) == len(set(computed)) == 8 * 3, "equal pairs of a request are computed once"


def test_a_full_queue_refuses_with_the_seconds_to_wait_and_takes_more_when_it_has_emptied() -> None:
    engine = FakeEngine(delay=0.05)

    async def work(batcher: Batcher) -> None:
        first = asyncio.create_task(batcher.score(engine, pairs(20)))
        while not engine.batches:
            await asyncio.sleep(0.01)
        with pytest.raises(Refusal, match=r"^\d+ tokens.*\b70\b") as refusal:
            await batcher.score(engine, pairs(20, "y"))
        assert refusal.value.status == 429
        assert refusal.value.retry_after is not None
        assert 1 <= refusal.value.retry_after <= 60
        assert len((await first)[0]) == 20
        assert len((await batcher.score(engine, pairs(20, "y")))[0]) == 20

    during(work, max_queued_tokens=70)


def test_a_request_that_is_cancelled_leaves_the_queue_and_harms_no_other() -> None:
    engine = FakeEngine(delay=0.02)

    async def work(batcher: Batcher) -> None:
        gone = asyncio.create_task(batcher.score(engine, pairs(200, "gone")))
        while not engine.batches:
            await asyncio.sleep(0.005)
        gone.cancel()
        computed = (await batcher.score(engine, pairs(5))).computed
        assert [score for score, _ in computed] == [lengths(pair) for pair in pairs(5)]
        assert batcher.queued_tokens == 0

    during(work)
    assert sum(pair[0] == "gone" for batch in engine.batches for pair in batch) < 100


def test_an_engine_that_fails_fails_the_requests_of_its_batch_and_no_other() -> None:
    def fails_for_bad(pair: Pair) -> float:
        if pair[0] == "bad":
            raise MemoryError("no room")
        return 1.0

    engine = FakeEngine(score=fails_for_bad)

    async def work(batcher: Batcher) -> None:
        with pytest.raises(MemoryError):
            await batcher.score(engine, [("bad", "")])
        assert [score for score, _ in (await batcher.score(engine, [("good", "")]))[0]] == [1.0]
        assert batcher.queued_tokens == 0

    during(work)
