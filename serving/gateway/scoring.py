"""Scores for the gateway, from a scorer in this process (in its own thread) or from a running `cappy serve`."""

import asyncio
import logging
import math
import re
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2

from cappy.errors import ConfigError
from cappy.records.instance import SELECTABLE, Status
from cappy.redaction import one_line, redact_address, register_address
from cappy.sampling.endpoint.client import (
    MAX_BYTES,
    ClientSettings,
    Connection,
    Deadlines,
    async_settings,
    max_connections,
    sync_settings,
)
from cappy.scoring.calibration import Calibration, parse_calibration, read_calibration
from cappy.selection.linear import Candidates, PoolFeatures, Selector, parse_selector, require_selector
from cappy.untrusted import read_json
from serving.config import EVALUATION_HEADER
from serving.gateway.errors import GatewayError
from serving.gateway.policy import expected_gain

Pair = tuple[str, str]
ScoreAndLogit = tuple[float, float]
"""(score, logit); candidates are ranked by logits, since large logits that differ may round to equal scores."""
ScoreFunction = Callable[[Sequence[Pair]], Awaitable[Sequence[float | ScoreAndLogit]]]
"""Returns the score of each (instruction, response) pair, or (score, logit) if the scorer has logits."""

PAIRS_PER_REQUEST = 1024
PROBE: Pair = ("What is 1 + 1?", "2")
REQUEST_SECONDS = 60.0
MAX_SCORES_BYTES = 1_000_000
"""Maximum size of a response of `cappy serve`: about 20 bytes per score, and the other fields."""
MAX_REASON_CHARACTERS = 200
SELECTOR_ATTEMPTS = 5
SELECTOR_WAIT_SECONDS = 0.1
"""Attempts to get the selector of the scores from a service whose replicas change, and the growth of the pauses."""
MAX_KNOWN_EVALUATIONS = 16
LOGGER = logging.getLogger("serving.gateway")
VALID_VERSION = re.compile(r"[!-~]{0,200}")
"""A version must be safe to write into headers."""


async def _close_nothing() -> None:
    """Does nothing: this scorer needs no closing."""


@dataclass(frozen=True)
class Evaluated:
    """What was fitted for a scorer when it was evaluated."""

    selector: Selector = field(default_factory=Selector)
    calibration: Calibration | None = None


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """A scoring function, the scorer's version, and what was fitted for the scorer.

    Version and `evaluated` may change while a running `cappy serve` is used.
    """

    score: ScoreFunction
    version: Callable[[], str]
    evaluated: Callable[[], Evaluated] = Evaluated
    close: Callable[[], Awaitable[None]] = _close_nothing

    @property
    def selector(self) -> Selector:
        """The selector of the scorer's present version."""
        return self.evaluated().selector

    @property
    def calibration(self) -> Calibration | None:
        """The calibration of the scorer's present version; None if it has none."""
        return self.evaluated().calibration

    def calibrate(self, scores: Sequence[float], *, n: int) -> list[float]:
        """The expected label for each score, 0 to 1, if it is the best of `n` distinct candidates.

        Without a calibration, returns the scores themselves.
        """
        calibration = self.calibration
        return calibration.apply(scores, n=n) if calibration else list(scores)

    async def __call__(self, pairs: Sequence[Pair]) -> list[float]:
        """Scores pairs; raises GatewayError 500 unless the scorer returns one finite score per pair."""
        return [score for score, _ in await self.score_with_logits(pairs)]

    async def score_with_logits(self, pairs: Sequence[Pair]) -> list[ScoreAndLogit]:
        """Scores pairs with their logits; a score without a logit is used as its logit."""
        values = await self.score(pairs)
        results = [value if isinstance(value, tuple) else (value, value) for value in values]
        if len(results) != len(pairs) or not all(_is_finite(number) for result in results for number in result):
            text = "the scorer did not return finite numbers, one per candidate; download or train it again"
            raise GatewayError(500, text, kind="scorer_error", code="scorer_bad_answer")
        return [(float(score), float(logit)) for score, logit in results]


@dataclass(frozen=True, kw_only=True)
class SampledCandidate:
    """One candidate: the choice as the server sent it, the fields of its record, and its score.

    `logit` is the score before the activation. `value` is the calibrated score: the expected label if this is the best
    of all candidates scored so far. Without a calibration it is the score. `rank` is its place among these candidates
    by the selector, 0 for the best one, and `selector_value` the value that the selector gives it. `greedy` says
    whether it was decoded greedily.
    """

    choice: Mapping[str, Any]
    text: str
    status: Status
    model: str
    generator: str
    seed: int | None = None
    logprob_sum: float | None = None
    num_tokens: int | None = None
    score: float | None = None
    value: float | None = None
    logit: float | None = None
    selector_value: float | None = None
    rank: int | None = None
    greedy: bool = False

    @property
    def likelihood(self) -> float | None:
        """Log-likelihood per token; None if it is unknown."""
        return self.logprob_sum / self.num_tokens if self.logprob_sum is not None and self.num_tokens else None

    @property
    def scorable(self) -> bool:
        """Whether it can be scored and selected: it has a text and is neither refused nor filtered."""
        return self.status in SELECTABLE


def with_values(candidates: Sequence[SampledCandidate], scoring: Scoring) -> list[SampledCandidate]:
    """Sets `value`, `selector_value` and `rank` of each candidate that has a score.

    The value is the score, calibrated for the best of n candidates with distinct texts.
    """
    scored, pool = _pool(candidates, scoring.selector)
    if pool is None:
        return list(candidates)
    calibrated = scoring.calibrate(pool.scores.tolist(), n=len(set(pool.responses)))
    ranking = scoring.selector.rank(pool)
    place = {index: rank for rank, index in enumerate(ranking.order)}
    changed = {
        id(candidate): replace(
            candidate, value=calibrated[index], selector_value=float(ranking.values[index]), rank=place[index]
        )
        for index, candidate in enumerate(scored)
    }
    return [changed.get(id(candidate), candidate) for candidate in candidates]


def expected_gain_of(candidates: Sequence[SampledCandidate], scoring: Scoring) -> float:
    """Expected gain in label by one more sample, or in score if no selector was fitted.

    The greedy response counts as the best so far if it is, but not as one that further samples resemble.
    """
    complete = [each for each in candidates if each.status != "truncated" and each.score is not None] or candidates
    scored, pool = _pool(complete, scoring.selector)
    if pool is None:
        return math.inf
    values = scoring.selector.label_values(pool)
    numbers = [candidate.value or 0.0 for candidate in scored] if values is None else values.tolist()
    sampled = [number for number, candidate in zip(numbers, scored, strict=True) if not candidate.greedy]
    return expected_gain(sampled, max(numbers))


def _pool(
    candidates: Sequence[SampledCandidate], selector: Selector
) -> tuple[list[SampledCandidate], PoolFeatures | None]:
    """The candidates that have a score, and what is known of them; None if there are none."""
    scored = [candidate for candidate in candidates if candidate.score is not None and candidate.logit is not None]
    if not scored:
        return [], None
    likelihoods = [candidate.likelihood for candidate in scored]
    known = [likelihood for likelihood in likelihoods if likelihood is not None]
    pool = Candidates(
        responses=[candidate.text for candidate in scored],
        likelihoods=known if len(known) == len(scored) else None,
        greedy=next((index for index, each in enumerate(scored) if each.greedy), None),
        truncated=[index for index, each in enumerate(scored) if each.status == "truncated"],
    )
    scores, logits = [each.score or 0.0 for each in scored], [each.logit or 0.0 for each in scored]
    return scored, selector.for_caller(pool.with_scores(scores, logits))


def ranking_key(candidate: SampledCandidate) -> tuple[bool, int]:
    """Sorts best first, by rank; those without a score come last."""
    return candidate.rank is None, candidate.rank or 0


def best_candidate(candidates: Sequence[SampledCandidate]) -> SampledCandidate | None:
    """The best candidate that has a score; None if there is none."""
    return min((each for each in candidates if each.rank is not None), key=ranking_key, default=None)


def load(spec: str, calibration: Path | None = None, selector: Path | None = None, key: str = "") -> Scoring:
    """Loads the scorer of a spec, or connects to a running `cappy serve`, and probes it; raises CappyError on failure.

    `key` is an API key of that service. `calibration` and `selector` are folders with calibration.json and
    selector.json; by default those of the scorer are used.
    """
    given = read_calibration(calibration) if calibration is not None else None
    if calibration is not None and given is None:
        raise ConfigError(f"{calibration}: has no calibration.json; give the folder of a scorer or of a report")
    scoring = _connect(spec, key) if spec.startswith(("http://", "https://")) else _load_scorer(spec)
    own, given_selector = scoring.evaluated, None if selector is None else require_selector(selector, scoring.version())

    def evaluated() -> Evaluated:
        # A running service may change its scorer, which the given selector does not belong to.
        belongs = given_selector is not None and given_selector.scorer in ("", scoring.version())
        return Evaluated(given_selector if belongs and given_selector else own().selector, given or own().calibration)

    return replace(scoring, evaluated=evaluated)


def _load_scorer(spec: str) -> Scoring:
    """Loads the scorer that a spec names; it runs one call at a time in its own thread."""
    from cappy.scorers import scorer_folder
    from cappy.scoring import Scorer
    from serving.engine import Model, ScorerEngine, probe

    scorer = Scorer.load(spec)
    probe(Model(engine=ScorerEngine(scorer), name=spec, version=scorer.version, precision=scorer.precision))
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scoring")

    def score_with_logits(pairs: Sequence[Pair]) -> list[ScoreAndLogit]:
        logits = scorer.logits_of(pairs)
        return list(zip(scorer.scores_of(logits), logits, strict=True))

    async def score(pairs: Sequence[Pair]) -> Sequence[ScoreAndLogit]:
        return await asyncio.get_running_loop().run_in_executor(worker, score_with_logits, pairs)

    async def close() -> None:
        worker.shutdown(wait=False, cancel_futures=True)

    own = Evaluated(scorer.selector, read_calibration(scorer_folder(spec)))
    return Scoring(score=score, version=lambda: scorer.version, evaluated=lambda: own, close=close)


def _connect(url: str, key: str = "") -> Scoring:
    """Connects to a running `cappy serve`; raises ConfigError if it does not answer.

    If it does not answer later, scoring raises GatewayError 503.
    """
    register_address(url)
    address, location = f"{url.rstrip('/')}/score", redact_address(url)
    selector_address = f"{url.rstrip('/')}/selector"
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        status, body, evaluation = _request_once(address, headers)
        if status == 401:
            raise ConfigError(
                f"{location}: needs a valid API key; put one into an environment variable and give its name with "
                "--scorer-key-variable"
            )
        if status != 200:
            raise ValueError(f"status {status}")
        version = _parse_scores(body)[1]
        known = _fetch_first(lambda: _request_once(selector_address, headers, get=True)[:2], evaluation)
        latest = [(version, known.get(evaluation, Evaluated()))]
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
        reason = one_line(str(error), MAX_REASON_CHARACTERS, key) or type(error).__name__
        raise ConfigError(f"{location}: no scorer answers ({reason}); start one: cappy serve --port ...") from None
    limits = httpx2.Limits(max_connections=max_connections(), max_keepalive_connections=20)
    client = httpx2.AsyncClient(timeout=REQUEST_SECONDS, limits=limits, **_add_headers(async_settings(), headers))

    async def request_scores(chunk: Sequence[Pair]) -> list[ScoreAndLogit]:
        extensions = {MAX_BYTES: MAX_SCORES_BYTES}
        async with asyncio.timeout(REQUEST_SECONDS):
            answer = await client.post(address, json={"pairs": chunk}, extensions=extensions)
            answer.raise_for_status()
            scores, version = _parse_scores(answer.content)
            evaluation = answer.headers.get(EVALUATION_HEADER, "")
            for attempt in range(SELECTOR_ATTEMPTS):
                if evaluation in known:
                    break
                # The service has another scorer or selector now; the next replica asked may have the former one.
                await asyncio.sleep(SELECTOR_WAIT_SECONDS * attempt)
                answer = await client.get(selector_address, extensions=extensions)
                _remember(known, *_parse_evaluated(answer.status_code, answer.content))
        if evaluation not in known:
            LOGGER.warning("%s changes its scorer: this pool is picked by the score alone", location)
        latest[0] = version, known.get(evaluation, Evaluated())
        return scores

    async def score(pairs: Sequence[Pair]) -> Sequence[ScoreAndLogit]:
        scores: list[ScoreAndLogit] = []
        try:
            for start in range(0, len(pairs), PAIRS_PER_REQUEST):
                scores += await request_scores(pairs[start : start + PAIRS_PER_REQUEST])
        except (httpx2.HTTPError, ValueError, TimeoutError) as error:
            status = f"status {error.response.status_code}" if isinstance(error, httpx2.HTTPStatusError) else ""
            text = f"the scorer does not answer ({status or type(error).__name__}); check that cappy serve runs"
            raise GatewayError(503, text, kind="scorer_error", code="scorer_unreachable") from None
        return scores

    return Scoring(score=score, version=lambda: latest[0][0], evaluated=lambda: latest[0][1], close=client.aclose)


def _fetch_first(request: Callable[[], tuple[int, bytes]], evaluation: str) -> dict[str, Evaluated]:
    """What the service has fitted, by its sha256; asks again while another replica answers than the one that scored."""
    known: dict[str, Evaluated] = {}
    for attempt in range(SELECTOR_ATTEMPTS):
        time.sleep(SELECTOR_WAIT_SECONDS * attempt)
        _remember(known, *_parse_evaluated(*request()))
        if evaluation in known:
            break
    return known


def _remember(known: dict[str, Evaluated], evaluation: str, evaluated: Evaluated) -> None:
    """Adds what was fitted, and forgets the oldest of many."""
    known[evaluation] = evaluated
    if len(known) > MAX_KNOWN_EVALUATIONS:
        del known[next(iter(known))]


def _request_once(address: str, headers: Mapping[str, str], *, get: bool = False) -> tuple[int, bytes, str]:
    """Scores the probe pair, or gets an address; returns status, body and `EVALUATION_HEADER` of the response."""
    connection, deadlines = Connection(), Deadlines()
    connection.max_bytes = MAX_SCORES_BYTES
    try:
        client_settings = _add_headers(sync_settings(connection), headers)
        with (
            httpx2.Client(timeout=REQUEST_SECONDS, **client_settings) as client,
            deadlines.within(REQUEST_SECONDS, connection),
        ):
            answer = client.get(address) if get else client.post(address, json={"pairs": [PROBE]})
        if connection.timed_out:
            raise ValueError(f"no answer within {REQUEST_SECONDS:g} s")
        return answer.status_code, answer.content, answer.headers.get(EVALUATION_HEADER, "")
    finally:
        deadlines.close()


def _add_headers(client_settings: ClientSettings, headers: Mapping[str, str]) -> ClientSettings:
    """Adds headers to the settings of a client."""
    return {**client_settings, "headers": {**client_settings["headers"], **headers}}


def _parse_scores(body: bytes) -> tuple[list[ScoreAndLogit], str]:
    """Parses scores, logits and the scorer's version; raises ValueError for an invalid response.

    Services of earlier releases return no logits; then the scores are used.
    """
    values = read_json(body)
    values = values if isinstance(values, dict) else {}
    scores, version = _parse_numbers(values.get("scores")), values.get("version")
    logits = _parse_numbers(values["logits"]) if "logits" in values else scores
    if len(scores) != len(logits):
        raise ValueError("the response does not have one logit per score")
    if not isinstance(version, str) or not VALID_VERSION.fullmatch(version):
        raise ValueError("the response has no valid scorer version")
    return list(zip(scores, logits, strict=True)), version


def _parse_evaluated(status: int, body: bytes) -> tuple[str, Evaluated]:
    """The selector and the calibration of a service, and their sha256; raises ValueError for an invalid response.

    Services of earlier releases have neither, and their scores name no sha256.
    """
    if status in (404, 405, 501):
        return "", Evaluated()
    try:
        if status != 200:
            raise ValueError(f"status {status} for the selector")
        values: Any = read_json(body)
        calibration = values["calibration"]
        return str(values.get("evaluation", "")), Evaluated(
            parse_selector(values["selector"]), None if calibration is None else parse_calibration(calibration)
        )
    except (KeyError, TypeError) as error:
        raise ValueError("the response has no valid selector") from error


def _parse_numbers(values: object) -> list[float]:
    if not isinstance(values, list) or not all(map(_is_finite, values)):
        raise ValueError("the response does not have finite numbers")
    return [float(value) for value in values]


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
