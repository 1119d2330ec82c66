"""Where scores come from: a scorer in this process, in a thread of its own, or a running `cappy serve`."""

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
    settings,
)
from cappy.scoring.calibration import Calibration, read_calibration
from cappy.untrusted import read_json
from serving.gateway.errors import GatewayError

Pair = tuple[str, str]
Rating = tuple[float, float]
"""(score, logit): a sigmoid gives equal scores to large logits that differ, so candidates are ranked by these."""
Score = Callable[[Sequence[Pair]], Awaitable[Sequence[float | Rating]]]
"""Scores of (instruction, response) pairs, in their order, each with its logit if there is one."""

PAIRS_PER_REQUEST = 1024
PROBE: Pair = ("What is 1 + 1?", "2")
SECONDS = 60.0
MAX_SCORES_BYTES = 1_000_000
"""Of an answer of a running `cappy serve`: about 20 bytes a score, and what it says beside them."""
MAX_SHOWN = 200
VERSION = re.compile(r"[!-~]{0,200}")
"""What a version may be: it goes into headers."""


async def _close_nothing() -> None:
    """Closes what needs no closing."""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """A function that scores, the version of what it scores with, and the map from scores to what they are worth."""

    score: Score
    version: Callable[[], str]
    calibration: Calibration | None = None
    close: Callable[[], Awaitable[None]] = _close_nothing

    def worth(self, scores: Sequence[float], *, n: int) -> list[float]:
        """What these scores are worth, each as the best of `n` distinct candidates.

        It is the expected label, 0 to 1, or without a calibration the score itself.
        """
        return self.calibration.apply(scores, n=n) if self.calibration else list(scores)

    async def __call__(self, pairs: Sequence[Pair]) -> list[float]:
        """Finite scores, one per pair; GatewayError 500 where the scorer gives others."""
        return [score for score, _ in await self.rate(pairs)]

    async def rate(self, pairs: Sequence[Pair]) -> list[Rating]:
        """The same with their logits; a score without one is its own."""
        values = await self.score(pairs)
        ratings = [value if isinstance(value, tuple) else (value, value) for value in values]
        if len(ratings) != len(pairs) or not all(_is_finite(value) for rating in ratings for value in rating):
            text = "the scorer answers what are not finite numbers, one per candidate; fetch or train it again"
            raise GatewayError(500, text, kind="scorer_error", code="scorer_bad_answer")
        return [(float(score), float(logit)) for score, logit in ratings]


def load(spec: str, calibration: Path | None = None, key: str = "") -> Scoring:
    """The scorer of a spec or of a running `cappy serve`, tried on one pair; CappyError where it is not a scorer.

    `key` is an API key of that service.
    `calibration` is a folder that holds calibration.json; a scorer's own folder is searched anyway.
    """
    given = read_calibration(calibration) if calibration is not None else None
    if calibration is not None and given is None:
        raise ConfigError(f"{calibration}: holds no calibration.json; name the folder of a scorer or of a report")
    scoring = _over_http(spec, key) if spec.startswith(("http://", "https://")) else _in_process(spec)
    return replace(scoring, calibration=given or scoring.calibration)


def _in_process(spec: str) -> Scoring:
    """The scorer that a spec names; one call at a time, in a thread of its own."""
    from cappy.scorers import scorer_folder
    from cappy.scoring import Scorer
    from serving.engine import Model, ScorerEngine, probe

    scorer = Scorer.load(spec)
    probe(Model(engine=ScorerEngine(scorer), name=spec, version=scorer.version, precision=scorer.precision))
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scoring")

    def rate(pairs: Sequence[Pair]) -> list[Rating]:
        logits = scorer.logits_of(pairs)
        return list(zip(scorer.scores_of(logits), logits, strict=True))

    async def score(pairs: Sequence[Pair]) -> Sequence[Rating]:
        return await asyncio.get_running_loop().run_in_executor(worker, rate, pairs)

    async def close() -> None:
        worker.shutdown(wait=False, cancel_futures=True)

    own = read_calibration(scorer_folder(spec))
    return Scoring(score=score, version=lambda: scorer.version, calibration=own, close=close)


def _over_http(url: str, key: str = "") -> Scoring:
    """The scorer of a running `cappy serve`; ConfigError where none answers; GatewayError 503 if none does later."""
    register_address(url)
    address, where = f"{url.rstrip('/')}/score", redact_address(url)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        status, body = _ask_once(address, headers)
        if status == 401:
            raise ConfigError(
                f"{where}: wants another API key; put it into a variable and name it: --scorer-key-variable"
            )
        if status != 200:
            raise ValueError(f"status {status}")
        current = [_scores(body)[1]]
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
        why = one_line(str(error), MAX_SHOWN, key) or type(error).__name__
        raise ConfigError(f"{where}: no scorer answers there ({why}); start it: cappy serve --port ...") from None
    limits = httpx2.Limits(max_connections=max_connections(), max_keepalive_connections=20)
    client = httpx2.AsyncClient(timeout=SECONDS, limits=limits, **_with(async_settings(), headers))

    async def ask(part: Sequence[Pair]) -> list[Rating]:
        async with asyncio.timeout(SECONDS):
            answer = await client.post(address, json={"pairs": part}, extensions={MAX_BYTES: MAX_SCORES_BYTES})
        answer.raise_for_status()
        scores, current[0] = _scores(answer.content)
        return scores

    async def score(pairs: Sequence[Pair]) -> Sequence[Rating]:
        scores: list[Rating] = []
        try:
            for start in range(0, len(pairs), PAIRS_PER_REQUEST):
                scores += await ask(pairs[start : start + PAIRS_PER_REQUEST])
        except (httpx2.HTTPError, ValueError, TimeoutError) as error:
            status = f"status {error.response.status_code}" if isinstance(error, httpx2.HTTPStatusError) else ""
            text = f"the scorer does not answer ({status or type(error).__name__}); see that cappy serve runs"
            raise GatewayError(503, text, kind="scorer_error", code="scorer_unreachable") from None
        return scores

    return Scoring(score=score, version=lambda: current[0], close=client.aclose)


def _ask_once(address: str, headers: Mapping[str, str]) -> tuple[int, bytes]:
    """Status and body of the answer to one pair."""
    connection, deadlines = Connection(), Deadlines()
    connection.max_bytes = MAX_SCORES_BYTES
    try:
        made = _with(settings(connection), headers)
        with httpx2.Client(timeout=SECONDS, **made) as client, deadlines.within(SECONDS, connection):
            answer = client.post(address, json={"pairs": [PROBE]})
        if connection.late:
            raise ValueError(f"no answer within {SECONDS:g} s")
        return answer.status_code, answer.content
    finally:
        deadlines.close()


def _with(made: ClientSettings, headers: Mapping[str, str]) -> ClientSettings:
    """The settings of a client with these headers beside its own."""
    return {**made, "headers": {**made["headers"], **headers}}


def _scores(body: bytes) -> tuple[list[Rating], str]:
    """The scores with their logits and the scorer's version in an answer; ValueError for anything else.

    An earlier release's service gives no logits; its scores stand for them.
    """
    values = read_json(body)
    values = values if isinstance(values, dict) else {}
    scores, version = _numbers(values.get("scores")), values.get("version")
    logits = _numbers(values["logits"]) if "logits" in values else scores
    if len(scores) != len(logits):
        raise ValueError("it does not answer a logit for each score")
    if not isinstance(version, str) or not VERSION.fullmatch(version):
        raise ValueError("it does not answer a scorer's version")
    return list(zip(scores, logits, strict=True)), version


def _numbers(values: object) -> list[float]:
    if not isinstance(values, list) or not all(map(_is_finite, values)):
        raise ValueError("it does not answer finite numbers")
    return [float(value) for value in values]


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
