"""One request from its first sample to its answer: rounds of samples, scores, and what follows from them."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from cappy.errors import CappyError
from cappy.sampling.generators import estimate_tokens
from serving.gateway.config import Policy, SpendingLimits
from serving.gateway.errors import GatewayError
from serving.gateway.policy import EXPECTED_TOKENS, Allowance, Ledger, Limit, Stop, Total, allow, decide
from serving.gateway.requests import ChatRequest
from serving.gateway.scoring import Scoring
from serving.gateway.upstream import Ask, Draw, Round, Upstream

SAMPLING_SHARE = 0.9
"""Of the seconds of a request; what is left is for the scorer."""
MAX_SCORED_CHARACTERS = 100_000
"""Of a response: scorers read its first thousand tokens or so, and encoding more would hold up all other requests."""
How = Literal["answered", "abstained", "escalated", "escalation-failed", "unscored"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a request: its candidates, the best first, and the ledger of all of them.

    `how` is `unscored` where no candidate was a text that could be scored (refused, filtered or empty): the LLM's own
    answer is given then.
    """

    request: ChatRequest
    draws: Sequence[Draw]
    how: How
    stop: Stop
    limit: Limit | None
    ledger: Ledger
    scorer: str
    calibrated: bool
    seconds: float

    @property
    def best(self) -> Draw:
        """The candidate with the highest score, the first of equal ones; a cut one only where none is whole."""
        return self.draws[0]


@dataclass(frozen=True, kw_only=True)
class Gateway:
    """The LLM, the scorer, the rules; `second` is the LLM to ask where the first one's best is below the floor."""

    first: Upstream
    scoring: Scoring
    policy: Policy = field(default_factory=Policy)
    limits: SpendingLimits = field(default_factory=SpendingLimits)
    second: Upstream | None = None
    second_candidates: int = 1
    total: Total = field(default_factory=Total)

    async def answer(self, request: ChatRequest, authorization: str) -> Outcome:
        """The outcome of a request; GatewayError where there is no candidate to answer with."""
        return await _Run(self, request, authorization).outcome()

    async def close(self) -> None:
        """Closes all connections, and lets the scorer go."""
        await self.scoring.close()
        await self.first.close()
        if self.second is not None:
            await self.second.close()


class _Run:
    def __init__(self, gateway: Gateway, request: ChatRequest, authorization: str) -> None:
        self._gateway = gateway
        self._request = request
        self._authorization = authorization
        self._ledger = Ledger(gateway.limits, gateway.total)
        self._draws: list[Draw] = []
        self._problems: list[GatewayError] = []
        self._limit: Limit | None = None
        self._started = time.monotonic()

    async def outcome(self) -> Outcome:
        gateway = self._gateway
        # Without randomness every candidate is the same.
        alike = self._request.temperature == 0 and gateway.policy.candidates > self._request.count
        most = self._request.count if alike else gateway.policy.candidates
        stop: Stop = await self._sample(gateway.first, most)
        if not self._draws:
            raise self._no_candidate()
        how = await self._judge()
        ranked = sorted(self._draws, key=_rank)
        return Outcome(
            request=self._request,
            draws=ranked,
            how=how,
            stop="temperature" if alike and stop == "candidates" else stop,
            limit=self._limit,
            ledger=self._ledger,
            scorer=gateway.scoring.version(),
            calibrated=gateway.scoring.calibration is not None,
            seconds=time.monotonic() - self._started,
        )

    async def _judge(self) -> How:
        """What the best candidate is good for; the second LLM is asked where there is one and it is not good enough."""
        gateway, best = self._gateway, self._best()
        floor = gateway.policy.floor
        if floor is None or (best is not None and best >= floor):
            return "answered" if best is not None else "unscored"
        if gateway.second is not None:
            before = len(self._draws)
            await self._sample(gateway.second, gateway.second_candidates)
            return "escalated" if len(self._draws) > before else "escalation-failed"
        return "abstained" if best is not None else "unscored"

    async def _sample(self, llm: Upstream, most: int) -> Stop:
        """Draws from an LLM in rounds, until the policy or a limit stops it."""
        start, asked = len(self._draws), 0
        while True:
            values = _values(self._draws[start:])
            drawn = len(self._draws) - start
            decision = decide(
                self._gateway.policy, values, asked=asked, drawn=drawn, wanted=min(self._request.count, most), most=most
            )
            if decision.stop:
                return decision.stop
            allowance = self._allowance(llm, decision.count, first=asked == 0)
            if not allowance.count:
                self._limit = allowance.limit
                return "limit"
            await self._round(llm, allowance, number=asked)
            asked += allowance.count
            if self._limit:
                return "limit"
            if len(self._draws) - start == drawn:
                return "upstream"

    async def _round(self, llm: Upstream, allowance: Allowance, *, number: int) -> None:
        """One round: its candidates scored, its problems kept, and the limit that it met."""
        until = self._started + SAMPLING_SHARE * self._gateway.limits.max_seconds
        drawn = Round()
        ask = Ask(
            request=self._request,
            authorization=self._authorization,
            ledger=self._ledger,
            most_tokens=allowance.most_tokens,
            seconds=self._gateway.limits.max_seconds,
        )
        try:
            async with asyncio.timeout(until - time.monotonic()):
                await llm.draw(ask, drawn, count=allowance.count, number=number)
        except TimeoutError:
            self._limit = "seconds"
        self._problems += drawn.problems
        if self._is_truncated(drawn, allowance):
            self._limit = self._limit or allowance.limit
        self._draws = with_values([*self._draws, *await self._score(drawn.draws)], self._gateway.scoring)

    async def _score(self, draws: Sequence[Draw]) -> list[Draw]:
        """The candidates with their scores; without, where the time ends first and earlier ones have theirs."""
        scorable = [draw for draw in draws if draw.scorable]
        if not scorable:
            return list(draws)
        left = self._started + self._gateway.limits.max_seconds - time.monotonic()
        try:
            async with asyncio.timeout(left):
                instruction = self._request.instruction
                pairs = [(instruction, draw.text[:MAX_SCORED_CHARACTERS]) for draw in scorable]
                ratings = await self._gateway.scoring.rate(pairs)
        except TimeoutError:
            self._limit = "seconds"
            if self._best() is not None:
                return list(draws)
            text = f"candidates are there, but the scorer did not answer within {self._gateway.limits.max_seconds:g} s"
            raise GatewayError(504, f"{text}; raise --max-seconds", kind="timeout", code="timeout") from None
        except CappyError as error:
            raise GatewayError(503, f"the scorer failed: {error}", kind="scorer_error", code="scorer_failed") from error
        known = {
            id(draw): replace(draw, score=score, logit=logit)
            for draw, (score, logit) in zip(scorable, ratings, strict=True)
        }
        return [known.get(id(draw), draw) for draw in draws]

    def _allowance(self, llm: Upstream, wanted: int, *, first: bool) -> Allowance:
        """How many of the wanted candidates the limits leave room for."""
        ledger, asked = self._ledger, self._request.most_tokens
        counted = max((_tokens(usage, "prompt_tokens") for usage in ledger.usages), default=0)
        longest = max((draw.num_tokens or estimate_tokens(draw.text) for draw in self._draws), default=EXPECTED_TOKENS)
        allowance = allow(
            wanted,
            ledger.budgets(),
            llm.llm.prices,
            prompt_tokens=counted or estimate_tokens(self._request.instruction),
            need=asked or longest,
            first=first and not self._draws,
        )
        if asked is None or allowance.most_tokens is None or allowance.most_tokens < asked:
            return allowance
        return Allowance(allowance.count, asked, None)

    def _is_truncated(self, drawn: Round, allowance: Allowance) -> bool:
        """Whether a candidate ended where the gateway's own limit let it."""
        return allowance.limit is not None and any(draw.choice.get("finish_reason") == "length" for draw in drawn.draws)

    def _best(self) -> float | None:
        return max(_values(self._draws), default=None)

    def _no_candidate(self) -> GatewayError:
        """Why there is no candidate."""
        if self._problems:
            return self._problems[0]
        limits = self._gateway.limits
        if self._limit == "seconds":
            text = f"the LLM gave no candidate within {SAMPLING_SHARE * limits.max_seconds:g} s; raise --max-seconds"
            return GatewayError(504, text, kind="timeout", code="timeout")
        if self._limit == "total-money":
            text = (
                f"the gateway's budget of {limits.max_total_cost:g} is used up; raise --max-total-cost and start again"
            )
            refusal = {"x-should-retry": "false"}
            return GatewayError(429, text, kind="insufficient_quota", code="insufficient_quota", headers=refusal)
        text = (
            f"the limit on a request's {self._limit} leaves no room for one candidate; shorten the prompt or raise it"
        )
        return GatewayError(400, text, code="limit_too_low")


def with_values(draws: Sequence[Draw], scoring: Scoring) -> list[Draw]:
    """The candidates with what their scores are worth among all of them; a text that was drawn twice counts once."""
    scores = {index: draw.score for index, draw in enumerate(draws) if draw.score is not None}
    if not scores:
        return list(draws)
    worth = scoring.worth(list(scores.values()), n=len({draws[index].text for index in scores}))
    values = dict(zip(scores, worth, strict=True))
    return [replace(draw, value=values.get(index)) for index, draw in enumerate(draws)]


def _rank(draw: Draw) -> tuple[bool, bool, float]:
    """Sorts the best first: whole responses by their logit, then those cut at their limit, then what has no score.

    A scorer reads how good a text is as far as it goes, not whether the rest is missing; a client that gets half an
    answer although a whole one was there is worse off than with one answer alone.
    """
    return draw.logit is None, draw.status == "truncated", -(draw.logit or 0.0)


def _values(draws: Sequence[Draw]) -> list[float]:
    """What the candidates that may be given are worth: those of whole responses where there are any."""
    scored_draws = [(draw.status, draw.value) for draw in draws if draw.value is not None]
    whole = [value for status, value in scored_draws if status != "truncated"]
    return whole or [value for _, value in scored_draws]


def _tokens(usage: dict[str, object], name: str) -> int:
    count = usage.get(name)
    return count if isinstance(count, int) else 0
