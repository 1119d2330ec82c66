"""Scores for the gateway, from a scorer in this process (in its own thread) or from a running `cappy serve`."""

import asyncio
import re
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import httpx2

from cappy.errors import ConfigError
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
from cappy.scoring.calibration import Calibration, read_calibration
from cappy.untrusted import read_json
from serving.gateway.errors import GatewayError

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
VALID_VERSION = re.compile(r"[!-~]{0,200}")
"""A version must be safe to write into headers."""


async def _close_nothing() -> None:
    """Does nothing: this scorer needs no closing."""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """A scoring function, the scorer's version, and its calibration."""

    score: ScoreFunction
    version: Callable[[], str]
    calibration: Calibration | None = None
    close: Callable[[], Awaitable[None]] = _close_nothing

    def calibrate(self, scores: Sequence[float], *, n: int) -> list[float]:
        """The expected label for each score, 0 to 1, if it is the best of `n` distinct candidates.

        Without a calibration, returns the scores themselves.
        """
        return self.calibration.apply(scores, n=n) if self.calibration else list(scores)

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


def load(spec: str, calibration: Path | None = None, key: str = "") -> Scoring:
    """Loads the scorer of a spec, or connects to a running `cappy serve`, and probes it; raises CappyError on failure.

    `key` is an API key of that service. `calibration` is a folder with calibration.json; by default the scorer's own
    folder is searched.
    """
    override = read_calibration(calibration) if calibration is not None else None
    if calibration is not None and override is None:
        raise ConfigError(f"{calibration}: has no calibration.json; give the folder of a scorer or of a report")
    scoring = _connect(spec, key) if spec.startswith(("http://", "https://")) else _load_scorer(spec)
    return replace(scoring, calibration=override or scoring.calibration)


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

    own_calibration = read_calibration(scorer_folder(spec))
    return Scoring(score=score, version=lambda: scorer.version, calibration=own_calibration, close=close)


def _connect(url: str, key: str = "") -> Scoring:
    """Connects to a running `cappy serve`; raises ConfigError if it does not answer.

    If it does not answer later, scoring raises GatewayError 503.
    """
    register_address(url)
    address, location = f"{url.rstrip('/')}/score", redact_address(url)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        status, body = _request_once(address, headers)
        if status == 401:
            raise ConfigError(
                f"{location}: needs a valid API key; put one into an environment variable and give its name with "
                "--scorer-key-variable"
            )
        if status != 200:
            raise ValueError(f"status {status}")
        latest_version = [_parse_scores(body)[1]]
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
        reason = one_line(str(error), MAX_REASON_CHARACTERS, key) or type(error).__name__
        raise ConfigError(f"{location}: no scorer answers ({reason}); start one: cappy serve --port ...") from None
    limits = httpx2.Limits(max_connections=max_connections(), max_keepalive_connections=20)
    client = httpx2.AsyncClient(timeout=REQUEST_SECONDS, limits=limits, **_add_headers(async_settings(), headers))

    async def request_scores(chunk: Sequence[Pair]) -> list[ScoreAndLogit]:
        async with asyncio.timeout(REQUEST_SECONDS):
            answer = await client.post(address, json={"pairs": chunk}, extensions={MAX_BYTES: MAX_SCORES_BYTES})
        answer.raise_for_status()
        scores, latest_version[0] = _parse_scores(answer.content)
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

    return Scoring(score=score, version=lambda: latest_version[0], close=client.aclose)


def _request_once(address: str, headers: Mapping[str, str]) -> tuple[int, bytes]:
    """Scores the probe pair; returns the status and body of the response."""
    connection, deadlines = Connection(), Deadlines()
    connection.max_bytes = MAX_SCORES_BYTES
    try:
        client_settings = _add_headers(sync_settings(connection), headers)
        with (
            httpx2.Client(timeout=REQUEST_SECONDS, **client_settings) as client,
            deadlines.within(REQUEST_SECONDS, connection),
        ):
            answer = client.post(address, json={"pairs": [PROBE]})
        if connection.timed_out:
            raise ValueError(f"no answer within {REQUEST_SECONDS:g} s")
        return answer.status_code, answer.content
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


def _parse_numbers(values: object) -> list[float]:
    if not isinstance(values, list) or not all(map(_is_finite, values)):
        raise ValueError("the response does not have finite numbers")
    return [float(value) for value in values]


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
