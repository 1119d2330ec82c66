"""Continuous batches: pairs of all requests that wait, in turn, within a budget of tokens.

One thread runs the scorer and one encodes, so the event loop stays free. As soon as a batch is computed the next is
filled with what waits by then. Every request gives one pair at a time, so one of a single pair is not held up behind
one of 500. A request keeps the engine it began with: a swap in its middle changes none of its scores.
"""

import asyncio
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from cappy.scoring.encoding import Encoded, Pair
from serving.refusals import Refusal

Computed = Sequence[tuple[float, float]]
"""(score, logit) of each pair of a batch."""


class Answer(NamedTuple):
    """(score, logit) of each pair in order, the tokens they have, the seconds that the first computed waited, and how
    many distinct pairs were cut."""

    computed: Computed
    tokens: int
    wait_seconds: float
    cut: int = 0


class Engine(Protocol):
    """What the batcher needs of a scorer."""

    @property
    def pads(self) -> bool:
        """Whether pairs of a batch cost as much as its longest."""

    def encode(self, pairs: Sequence[Pair]) -> Sequence[Encoded]:
        """The pairs as token ids."""

    def fit(self, pairs: Sequence[Pair]) -> bool:
        """Whether no pair is longer than the model reads."""

    def compute(self, batch: Sequence[Encoded]) -> Computed:
        """One pass of the model."""


@dataclass(eq=False)
class _Job:
    """A request: what of it waits, longest last, and what it has so far."""

    engine: Engine
    waiting: list[tuple[int, Encoded]]
    found: list[tuple[float, float]]
    left: int
    done: "asyncio.Future[None]"
    begun: float = 0.0
    """The loop's time when the first of it was computed; 0 before."""

    @property
    def tokens(self) -> int:
        return sum(len(pair.ids) for _, pair in self.waiting)


Batch = list[tuple[_Job, int, Encoded]]


@dataclass
class Batcher:
    """Scores pairs of concurrent requests; `queued_tokens` is what waits or is computed now.

    A request is refused with 429 where it would put more than `max_queued_tokens` into the queue, unless the queue is
    empty. `on_batch(tokens, pairs, seconds, cut)` is called after each batch; `cut` says how many pairs were cut.
    """

    batch_tokens: int
    max_queued_tokens: int
    on_batch: Callable[[int, int, float, int], None] = lambda tokens, pairs, seconds, cut: None
    computing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "computing"))
    """One thread, the one that loaded the scorer: once two threads have run a model, torch's OpenMP waits passively in
    both, and a single pair takes 38 ms instead of 22 (RoBERTa-base's shape, 2 cores, Intel Xeon, 2026-11-26)."""
    queued_tokens: int = 0
    rate: float = 0.0
    """Tokens per second, a moving average over batches; 0 before the first."""
    _jobs: deque[_Job] = field(default_factory=deque)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)
    _encoding: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "encoding"))

    async def score(self, engine: Engine, pairs: Sequence[Pair]) -> Answer:
        """The answer to each pair; equal pairs are computed once.

        Refusal 429 where the queue is full. A caller that is cancelled takes its pairs out of the queue.
        """
        self.admit(1)
        distinct = list(dict.fromkeys(pairs))
        encoded = await asyncio.get_running_loop().run_in_executor(self._encoding, engine.encode, distinct)
        tokens = sum(len(pair.ids) for pair in encoded)
        self.admit(tokens)
        waiting = sorted(enumerate(encoded), key=lambda numbered: len(numbered[1].ids))
        loop = asyncio.get_running_loop()
        done, queued = loop.create_future(), loop.time()
        job = _Job(engine, waiting, [(0.0, 0.0)] * len(distinct), len(distinct), done)
        self.queued_tokens += tokens
        self._jobs.append(job)
        self._arrived.set()
        try:
            await job.done
        finally:
            self.queued_tokens -= job.tokens
            job.waiting.clear()
        found = dict(zip(distinct, job.found, strict=True))
        cut = sum(not pair.whole for pair in encoded)
        return Answer([found[pair] for pair in pairs], tokens, job.begun - queued, cut)

    async def fit(self, engine: Engine, pairs: Sequence[Pair]) -> bool:
        """Whether no pair is longer than the engine reads."""
        return await asyncio.get_running_loop().run_in_executor(self._encoding, engine.fit, pairs)

    async def run(self) -> None:
        """Computes batch after batch, until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = fill(self._jobs, self.batch_tokens)
            if not batch:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            tokens, started = sum(len(pair.ids) for _, _, pair in batch), loop.time()
            pairs = [pair for _, _, pair in batch]
            for job, _, _ in batch:
                job.begun = job.begun or started
            try:
                computed = await loop.run_in_executor(self.computing, batch[0][0].engine.compute, pairs)
                _deliver(batch, computed)
            except Exception as error:  # noqa: BLE001 (each of the batch's requests is told)
                _fail(batch, error)
            finally:
                self.queued_tokens -= tokens
            cut = sum(not pair.whole for pair in pairs)
            self._measure(tokens, len(batch), loop.time() - started, cut)

    def admit(self, tokens: int) -> None:
        """Refusal 429 where the queue has no room for so many tokens; an empty one takes a request of any size."""
        if self.queued_tokens and self.queued_tokens + tokens > self.max_queued_tokens:
            text = f"{self.queued_tokens} tokens wait, and {self.max_queued_tokens} may; ask again later"
            raise Refusal(429, text, retry_after=self.retry_after())

    def retry_after(self) -> int:
        """Whole seconds after which the queue should have emptied, 1 to 60."""
        return min(60, max(1, round(self.queued_tokens / self.rate))) if self.rate else 1

    async def apart(self, work: Callable[[], None]) -> None:
        """Runs something else of the scorer's between two batches."""
        await asyncio.get_running_loop().run_in_executor(self.computing, work)

    def close(self) -> None:
        """Ends the threads after what they compute now."""
        self._encoding.shutdown(wait=False, cancel_futures=True)
        self.computing.shutdown(wait=False, cancel_futures=True)

    def _measure(self, tokens: int, pairs: int, seconds: float, cut: int) -> None:
        now = tokens / max(seconds, 1e-6)
        self.rate = now if not self.rate else 0.9 * self.rate + 0.1 * now
        self.on_batch(tokens, pairs, seconds, cut)


def fill(jobs: "deque[_Job]", budget: int) -> Batch:
    """The next batch, of one engine: the longest pair of the request whose turn it is, then one of each in turn.

    Takes what it gives out of `jobs`. With an engine that pads, the others are no longer than the first.
    """
    batch: Batch = []
    used = longest = 0
    passed: list[_Job] = []
    while jobs:
        job = jobs.popleft()
        if not job.waiting:
            continue
        engine = batch[0][0].engine if batch else job.engine
        room = _room(engine, budget, used, longest, len(batch))
        place = len(job.waiting) if not batch else bisect_right(job.waiting, room, key=lambda one: len(one[1].ids))
        if job.engine is not engine or not place:
            passed.append(job)
            continue
        index, pair = job.waiting.pop(place - 1)
        batch.append((job, index, pair))
        used, longest = used + len(pair.ids), max(longest, len(pair.ids))
        jobs.append(job)
    jobs.extend(passed)
    return batch


def _room(engine: Engine, budget: int, used: int, longest: int, count: int) -> int:
    """How long another pair may be."""
    if engine.pads and count:
        return longest if (count + 1) * longest <= budget else 0
    return budget - used


def _deliver(batch: Batch, computed: Computed) -> None:
    for (job, index, _), value in zip(batch, computed, strict=True):
        job.found[index] = value
        job.left -= 1
        if not job.left and not job.done.done():
            job.done.set_result(None)


def _fail(batch: Batch, error: Exception) -> None:
    for job, _, _ in batch:
        if not job.done.done():
            job.done.set_exception(error)
