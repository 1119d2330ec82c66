"""The served scorer: loading, probing, swapping, and continuous batching of concurrent requests.

A batch takes one pair at a time from each waiting request in turn, within a budget of tokens, so that a request with a
single pair does not wait for one with 500. As soon as a batch is computed, the next one is filled from the queue. One
thread encodes and one runs the scorer, so the event loop is not blocked. A request keeps the engine that it started
with: a swap does not change its scores.
"""

import asyncio
import hashlib
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Protocol

from cappy.errors import FolderError
from cappy.scoring import Precision
from cappy.scoring.calibration import Calibration, read_calibration
from cappy.scoring.encoding import EncodedPair, Pair
from cappy.selection.linear import Selector
from serving.bodies import Refusal
from serving.config import EVALUATION_HEADER

if TYPE_CHECKING:
    from cappy.registry.models import Version
    from cappy.scoring import Scorer

SHUTTING_DOWN = "the service is shutting down"
"""Reason for not being ready while the service still answers."""
Outputs = Sequence[tuple[float, float]]
"""(score, logit) of each pair of a batch."""
ProbePairs = Sequence[tuple[Pair, float | None]]
"""Pairs with their expected score, or None if any finite score is accepted."""

PROBES: ProbePairs = ((("What is 1 + 1?", "2"), None),)
"""Probe pairs for a scorer without stored ones."""
TOLERANCE = 2e-2
"""Maximum absolute difference between a score and the stored one.

The precision of stored scores is unknown. The built-in scorer's scores in bf16 differed by up to 7e-3 from those in
fp32 (256 pairs; 2 cores, Intel Xeon, 2026-11-26): a lower tolerance would refuse a sound version that was evaluated on
another machine. Damaged files are detected by their sha256; the probe detects wrong computation.
"""


class Engine(Protocol):
    """The methods of a scorer that the batcher calls."""

    @property
    def pads(self) -> bool:
        """Whether the pairs of a batch are padded to the longest one."""

    def encode(self, pairs: Sequence[Pair]) -> Sequence[EncodedPair]:
        """Tokenizes pairs."""

    def fits(self, pairs: Sequence[Pair]) -> bool:
        """Whether all pairs fit the model's maximum length."""

    def compute(self, batch: Sequence[EncodedPair]) -> Outputs:
        """Scores a batch in one forward pass."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A loaded scorer with its `name` for clients and the `version` and `sha256` of its manifest."""

    engine: Engine
    name: str
    version: str
    sha256: str = ""
    spec: str = ""
    precision: str = "fp32"
    calibration: Calibration | None = None
    """Maps scores to expected labels; None if the scorer has no calibration."""
    selector: Selector = field(default_factory=Selector)
    """Picks one of several responses; without selector.json, by the score alone."""
    probes: ProbePairs = ()
    """Verification pairs with their scores at evaluation, if they are stored with the scorer."""
    registered: "Version | None" = None
    """The version in the registry, if an alias is followed."""

    @property
    def content_hash(self) -> str:
        """The content hash of the version in the registry; empty if no alias is followed."""
        return self.registered.content_hash if self.registered else ""

    @cached_property
    def evaluation_hash(self) -> str:
        """The sha256 of the selector and the calibration: one scorer may be served with others after a promotion."""
        calibration = "" if self.calibration is None else self.calibration.to_json()
        return hashlib.sha256((self.selector.to_json() + calibration).encode()).hexdigest()

    def headers(self) -> Mapping[str, str]:
        """Headers of every response."""
        return {
            "X-Cappy-Version": self.version,
            "X-Cappy-Manifest-Sha256": self.sha256,
            EVALUATION_HEADER: self.evaluation_hash,
        }


class ScorerEngine:
    """Adapts a `Scorer` to the batcher."""

    def __init__(self, scorer: "Scorer") -> None:
        self._scorer = scorer

    @property
    def pads(self) -> bool:
        """Whether the pairs of a batch are padded to the longest one."""
        return self._scorer.pads

    @property
    def batch_tokens(self) -> int:
        """Batch size in tokens that suits the device."""
        return self._scorer.batch_tokens

    def encode(self, pairs: Sequence[Pair]) -> list[EncodedPair]:
        """Tokenizes pairs."""
        encoded: list[EncodedPair] = self._scorer.encoder.encode(pairs)
        return encoded

    def fits(self, pairs: Sequence[Pair]) -> bool:
        """Whether no pair has to be truncated."""
        return all(self._scorer.encoder.fits(pairs))

    def compute(self, batch: Sequence[EncodedPair]) -> Outputs:
        """Scores a batch in one forward pass."""
        logits = self._scorer.infer_logits(batch)
        return list(zip(self._scorer.to_scores(logits), logits.tolist(), strict=True))


def load(spec: str, name: str = "", precision: Precision = "auto") -> Model:
    """Loads the scorer that a spec names and checks the sha256 of every file; raises ConfigError or FolderError."""
    from cappy.scorers import open_scorer
    from cappy.scoring import Scorer
    from cappy.scoring.calibration import read_verification_pairs
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
        selector=scorer.selector,
        probes=[
            ((instruction, response), score) for instruction, response, score in read_verification_pairs(folder.path)
        ],
    )


def probe(model: Model, probe_pairs: ProbePairs = PROBES) -> None:
    """Scores probe pairs, which also warms the model up; raises FolderError if a score differs from the stored one.

    Scores one pair at a time, so that it needs little memory and hardly delays the requests that are being scored.
    """
    encoded = model.engine.encode([pair for pair, _ in probe_pairs])
    scores = [score for pair in encoded for score, _ in model.engine.compute([pair])]
    if len(scores) != len(probe_pairs) or not all(map(math.isfinite, scores)):
        raise FolderError(
            f"the scorer gives {scores} for the probe pairs; its weights are damaged, download or train it again"
        )
    for score, (_, expected) in zip(scores, probe_pairs, strict=True):
        if expected is not None and abs(score - expected) > TOLERANCE:
            text = f"the scorer gives {score:.4f} for a probe pair that scored {expected:.4f} at evaluation"
            raise FolderError(f"{text}; use the package versions of the evaluation, or evaluate the scorer again")


@dataclass
class Models:
    """The current model, and the former one, which `roll_back` restores."""

    current: Model
    former: Model | None = None
    not_loaded_reason: str = "the probe is running; try again"
    """Why requests cannot be scored; empty once the first model has passed its probe."""
    shutting_down: bool = False
    """Whether the service is shutting down."""
    refused: dict[str, str] = field(default_factory=dict)
    """Version in the registry -> why it was refused."""

    @property
    def unready_reason(self) -> str:
        """Why the service is not ready; empty if it is.

        Unlike `not_loaded_reason` it includes shutting down, during which requests are still answered.
        """
        return self.not_loaded_reason or (SHUTTING_DOWN if self.shutting_down else "")

    def find(self, *names: str | None) -> Model | None:
        """The current or the former model, if all non-empty `names` are its name, version or spec; None otherwise."""
        models = [model for model in (self.current, self.former) if model is not None]
        models_and_names = [(model, {"", None, model.name, model.version, model.spec}) for model in models]
        return next((model for model, known_names in models_and_names if known_names.issuperset(names)), None)

    def swap(self, model: Model) -> None:
        """Makes a probed model the current one, from the next request on."""
        self.former, self.current = self.current, model

    def roll_back(self) -> Model | None:
        """Swaps the current and the former model; None if there is no former one."""
        if self.former is None:
            return None
        self.current, self.former = self.former, self.current
        return self.current


class ScoredBatch(NamedTuple):
    """The result of a request: (score, logit) of each pair in order, and the number of tokens.

    `wait_seconds` is the time in the queue until the first pair was computed, `num_truncated` the number of distinct
    pairs that were truncated.
    """

    computed: Outputs
    tokens: int
    wait_seconds: float
    num_truncated: int = 0


@dataclass(eq=False)
class _Job:
    """A request in the queue: its pending pairs, longest last, and its results so far."""

    engine: Engine
    pending: list[tuple[int, EncodedPair]]
    results: list[tuple[float, float]]
    num_remaining: int
    done: "asyncio.Future[None]"
    started_at: float = 0.0
    """The event loop's time when its first pair was computed; 0 before."""

    @property
    def tokens(self) -> int:
        return sum(len(pair.ids) for _, pair in self.pending)


Batch = list[tuple[_Job, int, EncodedPair]]


@dataclass
class Batcher:
    """Scores pairs of concurrent requests; `queued_tokens` counts those that are queued or being computed.

    A request is refused with 429 if it would exceed `max_queued_tokens`, unless the queue is empty. After each batch
    `on_batch(tokens, pairs, seconds, num_truncated)` is called.
    """

    batch_tokens: int
    max_queued_tokens: int
    on_batch: Callable[[int, int, float, int], None] = lambda tokens, pairs, seconds, num_truncated: None
    executor: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "computing"))
    """One thread, which also loaded the scorer: if two threads have run a model, torch's OpenMP waits passively in
    both, and a single pair takes 38 ms instead of 22 (size of RoBERTa-base, 2 cores, Intel Xeon, 2026-11-26)."""
    queued_tokens: int = 0
    rate: float = 0.0
    """Tokens per second, a moving average over batches; 0 before the first."""
    _jobs: deque[_Job] = field(default_factory=deque)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)
    _encoding_executor: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "encoding"))

    async def score(self, engine: Engine, pairs: Sequence[Pair]) -> ScoredBatch:
        """Scores pairs and returns the results in their order; equal pairs are computed once.

        Raises Refusal 429 if the queue is full. If the caller is cancelled, its pairs leave the queue.
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
        return ScoredBatch([by_pair[pair] for pair in pairs], tokens, job.started_at - queued_at, num_truncated)

    async def fits(self, engine: Engine, pairs: Sequence[Pair]) -> bool:
        """Whether all pairs fit the engine's maximum length."""
        return await asyncio.get_running_loop().run_in_executor(self._encoding_executor, engine.fits, pairs)

    async def run(self) -> None:
        """Computes batches until it is cancelled."""
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
            except Exception as error:  # noqa: BLE001 (every request of the batch raises it)
                _fail(batch, error)
            finally:
                self.queued_tokens -= tokens
            num_truncated = sum(not pair.whole for pair in pairs)
            self._record_batch(tokens, len(batch), loop.time() - started, num_truncated)

    def admit(self, tokens: int) -> None:
        """Raises Refusal 429 if the queue has no room for these tokens; an empty queue takes a request of any size."""
        if self.queued_tokens and self.queued_tokens + tokens > self.max_queued_tokens:
            limit = f"at most {self.max_queued_tokens} are accepted"
            text = f"{self.queued_tokens} tokens are queued, {limit}; try again later"
            raise Refusal(429, text, retry_after=self.retry_after())

    def retry_after(self) -> int:
        """Estimated seconds until the queue is empty, a whole number from 1 to 60."""
        return min(60, max(1, round(self.queued_tokens / self.rate))) if self.rate else 1

    async def run_between_batches(self, work: Callable[[], None]) -> None:
        """Runs `work` in the scorer's thread, between two batches."""
        await asyncio.get_running_loop().run_in_executor(self.executor, work)

    def close(self) -> None:
        """Stops the threads after their current work."""
        self._encoding_executor.shutdown(wait=False, cancel_futures=True)
        self.executor.shutdown(wait=False, cancel_futures=True)

    def _record_batch(self, tokens: int, pairs: int, seconds: float, num_truncated: int) -> None:
        rate = tokens / max(seconds, 1e-6)
        self.rate = rate if not self.rate else 0.9 * self.rate + 0.1 * rate
        self.on_batch(tokens, pairs, seconds, num_truncated)


def take_batch(jobs: "deque[_Job]", budget: int) -> Batch:
    """Takes the next batch out of `jobs`: the longest pair of the next request, then one pair of each in turn.

    All pairs are for the same engine. If the engine pads, no other pair is longer than the first.
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
    """Maximum length of another pair, in tokens."""
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
