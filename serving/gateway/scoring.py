"""Where scores come from: a scorer in this process, in a thread of its own, or a running `cappy serve`."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import httpx2

from cappy.errors import ConfigError
from cappy.scoring.calibration import Calibration, read_calibration
from serving.gateway.errors import GatewayError

Pair = tuple[str, str]
Score = Callable[[Sequence[Pair]], Awaitable[Sequence[float]]]
"""Scores of (instruction, response) pairs, in their order."""

PAIRS_PER_REQUEST = 1024
PROBE: Pair = ("What is 1 + 1?", "2")
SECONDS = 60.0


async def _nothing() -> None:
    """Closes what needs no closing."""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """A function that scores, the version of what it scores with, and the map from scores to what they are worth."""

    score: Score
    version: Callable[[], str]
    calibration: Calibration | None = None
    close: Callable[[], Awaitable[None]] = _nothing

    def worth(self, scores: Sequence[float]) -> list[float]:
        """What these scores are worth: the expected label, 0 to 1, or without a calibration the scores themselves."""
        return self.calibration.apply(scores) if self.calibration else list(scores)

    async def __call__(self, pairs: Sequence[Pair]) -> list[float]:
        """Finite scores, one per pair; GatewayError 500 where the scorer gives others."""
        scores = [float(score) for score in await self.score(pairs)]
        if len(scores) != len(pairs) or not all(map(math.isfinite, scores)):
            text = "the scorer answers what are no finite numbers, one per candidate; fetch or train it again"
            raise GatewayError(500, text, kind="scorer_error", code="scorer_bad_answer")
        return scores


def load(spec: str, calibration: Path | None = None, key: str = "") -> Scoring:
    """What a spec or the address of a running `cappy serve` names, tried on one pair; CappyError where it is no scorer.

    `key` is an API key of that service.
    `calibration` is a folder that holds calibration.json; a scorer's own folder is looked into without being told.
    """
    given = read_calibration(calibration) if calibration is not None else None
    if calibration is not None and given is None:
        raise ConfigError(f"{calibration}: holds no calibration.json; name the folder of a scorer or of a report")
    found = over_http(spec, key) if spec.startswith(("http://", "https://")) else in_process(spec)
    return replace(found, calibration=given or found.calibration)


def in_process(spec: str) -> Scoring:
    """The scorer that a spec names; one call at a time, in a thread of its own."""
    from cappy.scoring import Scorer
    from cappy.specs import scorer_folder
    from serving.models import Model, ScorerEngine, probe

    scorer = Scorer.load(spec)
    probe(Model(engine=ScorerEngine(scorer), name=spec, version=scorer.version, precision=scorer.precision))
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scoring")

    async def score(pairs: Sequence[Pair]) -> Sequence[float]:
        return await asyncio.get_running_loop().run_in_executor(worker, scorer.score, pairs)

    async def close() -> None:
        worker.shutdown(wait=False, cancel_futures=True)

    own = read_calibration(scorer_folder(spec))
    return Scoring(score=score, version=lambda: scorer.version, calibration=own, close=close)


def over_http(url: str, key: str = "") -> Scoring:
    """The scorer of a running `cappy serve`; ConfigError where none answers; GatewayError 503 if none does later."""
    address = f"{url.rstrip('/')}/score"
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx2.post(address, json={"pairs": [PROBE]}, headers=headers, timeout=SECONDS)
        if answer.status_code == 401:
            raise ConfigError(
                f"{url}: wants another API key; put it into a variable and name it: --scorer-key-variable"
            )
        current = [str(answer.raise_for_status().json()["version"])]
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, KeyError, TypeError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{url}: no scorer answers there ({why}); start it: cappy serve --port ...") from None
    client = httpx2.AsyncClient(timeout=SECONDS, headers=headers)

    async def score(pairs: Sequence[Pair]) -> Sequence[float]:
        scores: list[float] = []
        try:
            for start in range(0, len(pairs), PAIRS_PER_REQUEST):
                part = pairs[start : start + PAIRS_PER_REQUEST]
                found = (await client.post(address, json={"pairs": part})).raise_for_status().json()
                scores += found["scores"]
                current[0] = str(found["version"])
        except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
            status = f"status {error.response.status_code}" if isinstance(error, httpx2.HTTPStatusError) else ""
            text = f"the scorer does not answer ({status or type(error).__name__}); see that cappy serve runs"
            raise GatewayError(503, text, kind="scorer_error", code="scorer_unreachable") from None
        return scores

    return Scoring(score=score, version=lambda: current[0], close=client.aclose)
