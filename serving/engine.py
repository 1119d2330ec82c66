"""The scorer that is served: loaded, verified, probed, changed at a stroke, and computing continuous batches.

Batches hold pairs of all requests that wait, in turn, within a budget of tokens. One thread runs the scorer and one
encodes, so the event loop stays free. As soon as a batch is computed the next is filled with what waits by then. Every
request gives one pair at a time, so one of a single pair is not held up behind one of 500. A request keeps the engine
it began with: a swap in its middle changes none of its scores.
"""

import asyncio
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from cappy.errors import FolderError
from cappy.scoring import Precision
from cappy.scoring.calibration import Calibration, read_calibration
from cappy.scoring.encoding import EncodedPair, Pair
from serving.bodies import Refusal

if TYPE_CHECKING:
    from cappy.registry.models import Version
    from cappy.scoring import Scorer

SHUTTING_DOWN = "the service is shutting down"
"""Why a service is not ready that still answers."""
Outputs = Sequence[tuple[float, float]]
"""(score, logit) of each pair of a batch."""
ProbePairs = Sequence[tuple[Pair, float | None]]
"""Pairs with the score that they must have, or None where any finite number will do."""

PROBES: ProbePairs = ((("What is 1 + 1?", "2"), None),)
"""For a scorer that nobody stored pairs with."""
TOLERANCE = 2e-2
"""How far a score may be from the stored one.

Stored pairs do not say in which precision they were scored. The built-in scorer's answers in bf16 were up to 7e-3 from
those in fp32 (256 pairs; 2 cores, Intel Xeon, 2026-11-26): less would refuse a sound version that was evaluated on
another machine. That the files are the registered ones, their sha256 says; this finds what computes them wrongly.
"""


class Engine(Protocol):
    """What the batcher needs of a scorer."""

    @property
    def pads(self) -> bool:
        """Whether pairs of a batch cost as much as its longest."""

    def encode(self, pairs: Sequence[Pair]) -> Sequence[EncodedPair]:
        """The pairs as token ids."""

    def fits(self, pairs: Sequence[Pair]) -> bool:
        """Whether no pair is longer than the model reads."""

    def compute(self, batch: Sequence[EncodedPair]) -> Outputs:
        """One pass of the model."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A loaded scorer and what is said of it: `name` to ask for it by, `version` and `sha256` of its manifest."""

    engine: Engine
    name: str
    version: str
    sha256: str = ""
    spec: str = ""
    precision: str = "fp32"
    calibration: Calibration | None = None
    """What labels to expect of scores; None where the scorer has none."""
    probes: ProbePairs = ()
    """What it answered when it was evaluated, where that came with it."""
    registered: "Version | None" = None
    """What the registry says of it, where an alias is followed."""

    @property
    def content(self) -> str:
        """What tells it from other versions in the registry; empty where no alias is followed."""
        return self.registered.content if self.registered else ""

    def headers(self) -> Mapping[str, str]:
        """What every answer carries."""
        return {"X-Cappy-Version": self.version, "X-Cappy-Manifest-Sha256": self.sha256}


class ScorerEngine:
    """A `Scorer` as the batcher needs it."""

    def __init__(self, scorer: "Scorer") -> None:
        self._scorer = scorer

    @property
    def pads(self) -> bool:
        """Whether this encoder's build is computed with padding."""
        return self._scorer.pads

    @property
    def batch_tokens(self) -> int:
        """Tokens of a batch that suit the device."""
        return self._scorer.batch_tokens

    def encode(self, pairs: Sequence[Pair]) -> list[EncodedPair]:
        """The pairs as token ids."""
        encoded: list[EncodedPair] = self._scorer.encoder.encode(pairs)
        return encoded

    def fits(self, pairs: Sequence[Pair]) -> bool:
        """Whether no pair has to be cut."""
        return all(self._scorer.encoder.fit(pairs))

    def compute(self, batch: Sequence[EncodedPair]) -> Outputs:
        """One pass of the model."""
        logits = self._scorer.forward(batch)
        return list(zip(self._scorer.decode(logits), logits.tolist(), strict=True))


def load(spec: str, name: str = "", precision: Precision = "auto") -> Model:
    """The scorer that a spec names, every file's sha256 checked; ConfigError or FolderError with the remedy."""
    from cappy.scorers import open_scorer
    from cappy.scoring import Scorer
    from cappy.scoring.calibration import read_probe
    from cappy.specs import parse_spec

    folder = open_scorer(spec)
    scorer = Scorer.load(str(folder.path), precision=precision)
    parsed = parse_spec(spec)
    return Model(
        engine=ScorerEngine(scorer),
        name=name or parsed.name.rstrip("/").rpartition("/")[2] or "cappy",
        version=scorer.version,
        sha256=folder.hash,
        spec=spec,
        precision=scorer.precision,
        calibration=read_calibration(folder.path),
        probes=[((instruction, response), score) for instruction, response, score in read_probe(folder.path)],
    )


def probe(model: Model, probe_pairs: ProbePairs = PROBES) -> None:
    """Scores stored pairs, which also warms the model up; FolderError where an answer is not what it must be.

    One pair at a time: beside a model that answers, they need little memory and leave it its turns.
    """
    encoded = model.engine.encode([pair for pair, _ in probe_pairs])
    scores = [score for pair in encoded for score, _ in model.engine.compute([pair])]
    if len(scores) != len(probe_pairs) or not all(map(math.isfinite, scores)):
        raise FolderError(
            f"the scorer answers {scores} to stored pairs; its weights are damaged, fetch or train it again"
        )
    for score, (_, expected) in zip(scores, probe_pairs, strict=True):
        if expected is not None and abs(score - expected) > TOLERANCE:
            text = f"the scorer answers {score:.4f} to a stored pair that had {expected:.4f} when it was evaluated"
            raise FolderError(f"{text}; serve it with the versions that evaluated it, or evaluate it again")


@dataclass
class Models:
    """The model that answers now and the one before it, which `back` puts in its place again."""

    current: Model
    former: Model | None = None
    reason: str = "the probe is running; ask again"
    """Why there are no scores to be had; empty once the current model has answered its probe."""
    shutting_down: bool = False
    """Whether the service is shutting down."""
    refused: dict[str, str] = field(default_factory=dict)
    """Version of the registry -> why it does not serve."""

    @property
    def unready(self) -> str:
        """Why new clients should look elsewhere; empty where they need not.

        A service that is shutting down still answers, so this is more than `reason`.
        """
        return self.reason or (SHUTTING_DOWN if self.shutting_down else "")

    def find(self, *names: str | None) -> Model | None:
        """The model of which each of these is name, version or spec, the current one first; an empty one is any."""
        models = [model for model in (self.current, self.former) if model is not None]
        models_and_names = [(model, {"", None, model.name, model.version, model.spec}) for model in models]
        return next((model for model, known_names in models_and_names if known_names.issuperset(names)), None)

    def swap(self, model: Model) -> None:
        """Lets a probed model answer from the next request on."""
        self.former, self.current = self.current, model

    def roll_back(self) -> Model | None:
        """Changes the current model for the one before; None if there is none."""
        if self.former is None:
            return None
        self.current, self.former = self.former, self.current
        return self.current


class Answer(NamedTuple):
    """(score, logit) of each pair in order, the tokens they have, the seconds that the first computed waited, and how
    many distinct pairs were cut."""

    computed: Outputs
    tokens: int
    wait_seconds: float
    num_truncated: int = 0


@dataclass(eq=False)
class _Job:
    """A request: what of it waits, longest last, and what it has so far."""

    engine: Engine
    pending: list[tuple[int, EncodedPair]]
    results: list[tuple[float, float]]
    num_remaining: int
    done: "asyncio.Future[None]"
    started_at: float = 0.0
    """The loop's time when the first of it was computed; 0 before."""

    @property
    def tokens(self) -> int:
        return sum(len(pair.ids) for _, pair in self.pending)


Batch = list[tuple[_Job, int, EncodedPair]]


@dataclass
class Batcher:
    """Scores pairs of concurrent requests; `queued_tokens` is what waits or is computed now.

    A request is refused with 429 where it would put more than `max_queued_tokens` into the queue, unless the queue is
    empty. `on_batch(tokens, pairs, seconds, cut)` is called after each batch; `cut` says how many pairs were cut.
    """

    batch_tokens: int
    max_queued_tokens: int
    on_batch: Callable[[int, int, float, int], None] = lambda tokens, pairs, seconds, num_truncated: None
    executor: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "computing"))
    """One thread, the one that loaded the scorer: once two threads have run a model, torch's OpenMP waits passively in
    both, and a single pair takes 38 ms instead of 22 (RoBERTa-base's shape, 2 cores, Intel Xeon, 2026-11-26)."""
    queued_tokens: int = 0
    rate: float = 0.0
    """Tokens per second, a moving average over batches; 0 before the first."""
    _jobs: deque[_Job] = field(default_factory=deque)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)
    _encoding_executor: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "encoding"))

    async def score(self, engine: Engine, pairs: Sequence[Pair]) -> Answer:
        """The answer to each pair; equal pairs are computed once.

        Refusal 429 where the queue is full. A caller that is cancelled takes its pairs out of the queue.
        """
        self.admit(1)
        distinct = list(dict.fromkeys(pairs))
        encoded = await asyncio.get_running_loop().run_in_executor(self._encoding_executor, engine.encode, distinct)
        tokens = sum(len(pair.ids) for pair in encoded)
        self.admit(tokens)
        pending = sorted(enumerate(encoded), key=lambda item: len(item[1].ids))
        loop = asyncio.get_running_loop()
        done, queued_at = loop.create_future(), loop.time()
        job = _Job(engine, pending, [(0.0, 0.0)] * len(distinct), len(distinct), done)
        self.queued_tokens += tokens
        self._jobs.append(job)
        self._arrived.set()
        try:
            await job.done
        finally:
            self.queued_tokens -= job.tokens
            job.pending.clear()
        by_pair = dict(zip(distinct, job.results, strict=True))
        num_truncated = sum(not pair.whole for pair in encoded)
        return Answer([by_pair[pair] for pair in pairs], tokens, job.started_at - queued_at, num_truncated)

    async def fits(self, engine: Engine, pairs: Sequence[Pair]) -> bool:
        """Whether no pair is longer than the engine reads."""
        return await asyncio.get_running_loop().run_in_executor(self._encoding_executor, engine.fits, pairs)

    async def run(self) -> None:
        """Computes batch after batch, until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = take_batch(self._jobs, self.batch_tokens)
            if not batch:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            tokens, started = sum(len(pair.ids) for _, _, pair in batch), loop.time()
            pairs = [pair for _, _, pair in batch]
            for job, _, _ in batch:
                job.started_at = job.started_at or started
            try:
                computed = await loop.run_in_executor(self.executor, batch[0][0].engine.compute, pairs)
                _deliver(batch, computed)
            except Exception as error:  # noqa: BLE001 (each of the batch's requests gets it)
                _fail(batch, error)
            finally:
                self.queued_tokens -= tokens
            num_truncated = sum(not pair.whole for pair in pairs)
            self._measure(tokens, len(batch), loop.time() - started, num_truncated)

    def admit(self, tokens: int) -> None:
        """Refusal 429 where the queue has no room for so many tokens; an empty one takes a request of any size."""
        if self.queued_tokens and self.queued_tokens + tokens > self.max_queued_tokens:
            text = f"{self.queued_tokens} tokens wait, and {self.max_queued_tokens} may; ask again later"
            raise Refusal(429, text, retry_after=self.retry_after())

    def retry_after(self) -> int:
        """Whole seconds after which the queue should have emptied, 1 to 60."""
        return min(60, max(1, round(self.queued_tokens / self.rate))) if self.rate else 1

    async def run_between_batches(self, work: Callable[[], None]) -> None:
        """Runs something else of the scorer's between two batches."""
        await asyncio.get_running_loop().run_in_executor(self.executor, work)

    def close(self) -> None:
        """Ends the threads after what they compute now."""
        self._encoding_executor.shutdown(wait=False, cancel_futures=True)
        self.executor.shutdown(wait=False, cancel_futures=True)

    def _measure(self, tokens: int, pairs: int, seconds: float, num_truncated: int) -> None:
        rate = tokens / max(seconds, 1e-6)
        self.rate = rate if not self.rate else 0.9 * self.rate + 0.1 * rate
        self.on_batch(tokens, pairs, seconds, num_truncated)


def take_batch(jobs: "deque[_Job]", budget: int) -> Batch:
    """The next batch, of one engine: the longest pair of the request whose turn it is, then one of each in turn.

    Takes what it gives out of `jobs`. With an engine that pads, the others are no longer than the first.
    """
    batch: Batch = []
    num_tokens = max_length = 0
    skipped: list[_Job] = []
    while jobs:
        job = jobs.popleft()
        if not job.pending:
            continue
        engine = batch[0][0].engine if batch else job.engine
        max_tokens = _max_pair_tokens(engine, budget, num_tokens, max_length, len(batch))
        end = (
            len(job.pending) if not batch else bisect_right(job.pending, max_tokens, key=lambda item: len(item[1].ids))
        )
        if job.engine is not engine or not end:
            skipped.append(job)
            continue
        index, pair = job.pending.pop(end - 1)
        batch.append((job, index, pair))
        num_tokens, max_length = num_tokens + len(pair.ids), max(max_length, len(pair.ids))
        jobs.append(job)
    jobs.extend(skipped)
    return batch


def _max_pair_tokens(engine: Engine, budget: int, num_tokens: int, max_length: int, num_pairs: int) -> int:
    """How long another pair may be."""
    if engine.pads and num_pairs:
        return max_length if (num_pairs + 1) * max_length <= budget else 0
    return budget - num_tokens


def _deliver(batch: Batch, computed: Outputs) -> None:
    for (job, index, _), value in zip(batch, computed, strict=True):
        job.results[index] = value
        job.num_remaining -= 1
        if not job.num_remaining and not job.done.done():
            job.done.set_result(None)


def _fail(batch: Batch, error: Exception) -> None:
    for job, _, _ in batch:
        if not job.done.done():
            job.done.set_exception(error)
