"""One request from its first sample to its answer: rounds of samples, scores, and what follows from them."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from cappy.errors import CappyError
from cappy.sampling.generators import tokens_of
from serving.gateway.config import Policy, SpendingLimits
from serving.gateway.errors import GatewayError
from serving.gateway.policy import EXPECTED_TOKENS, Allowance, Ledger, Limit, Stop, Total, allow, decide
from serving.gateway.requests import ChatRequest
from serving.gateway.scoring import Scoring
from serving.gateway.upstream import RoundResult, SampledCandidate, SamplingCall, Upstream

SAMPLING_SHARE = 0.9
"""Of the seconds of a request; what is left is for the scorer."""
MAX_SCORED_CHARACTERS = 100_000
"""Of a response: scorers read its first thousand tokens or so, and encoding more would hold up all other requests."""
OutcomeKind = Literal["answered", "abstained", "escalated", "escalation-failed", "unscored"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a request: its candidates, the best first, and the ledger of all of them.

    `how` is `unscored` where no candidate was a text that could be scored (refused, filtered or empty): the LLM's own
    answer is given then.
    """

    request: ChatRequest
    candidates: Sequence[SampledCandidate]
    kind: OutcomeKind
    stop: Stop
    limit: Limit | None
    ledger: Ledger
    scorer: str
    calibrated: bool
    seconds: float

    @property
    def best(self) -> SampledCandidate:
        """The candidate with the highest score, the first of equal ones; a cut one only where none is whole."""
        return self.candidates[0]


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
        self._candidates: list[SampledCandidate] = []
        self._problems: list[GatewayError] = []
        self._limit: Limit | None = None
        self._started = time.monotonic()

    async def outcome(self) -> Outcome:
        gateway = self._gateway
        # Without randomness every candidate is the same.
        deterministic = self._request.temperature == 0 and gateway.policy.candidates > self._request.count
        max_candidates = self._request.count if deterministic else gateway.policy.candidates
        stop: Stop = await self._sample(gateway.first, max_candidates)
        if not self._candidates:
            raise self._no_candidate_error()
        kind = await self._decide_outcome()
        ranked_candidates = sorted(self._candidates, key=_ranking_key)
        return Outcome(
            request=self._request,
            candidates=ranked_candidates,
            kind=kind,
            stop="temperature" if deterministic and stop == "candidates" else stop,
            limit=self._limit,
            ledger=self._ledger,
            scorer=gateway.scoring.version(),
            calibrated=gateway.scoring.calibration is not None,
            seconds=time.monotonic() - self._started,
        )

    async def _decide_outcome(self) -> OutcomeKind:
        """What the best candidate is good for; the second LLM is asked where there is one and it is not good enough."""
        gateway, best = self._gateway, self._best()
        floor = gateway.policy.floor
        if floor is None or (best is not None and best >= floor):
            return "answered" if best is not None else "unscored"
        if gateway.second is not None:
            num_before = len(self._candidates)
            await self._sample(gateway.second, gateway.second_candidates)
            return "escalated" if len(self._candidates) > num_before else "escalation-failed"
        return "abstained" if best is not None else "unscored"

    async def _sample(self, llm: Upstream, max_candidates: int) -> Stop:
        """Draws from an LLM in rounds, until the policy or a limit stops it."""
        start, num_requested = len(self._candidates), 0
        while True:
            values = _values(self._candidates[start:])
            num_received = len(self._candidates) - start
            decision = decide(
                self._gateway.policy,
                values,
                num_requested=num_requested,
                num_received=num_received,
                min_candidates=min(self._request.count, max_candidates),
                max_candidates=max_candidates,
            )
            if decision.stop:
                return decision.stop
            allowance = self._allowance(llm, decision.count, first=num_requested == 0)
            if not allowance.count:
                self._limit = allowance.limit
                return "limit"
            await self._round(llm, allowance, first_index=num_requested)
            num_requested += allowance.count
            if self._limit:
                return "limit"
            if len(self._candidates) - start == num_received:
                return "upstream"

    async def _round(self, llm: Upstream, allowance: Allowance, *, first_index: int) -> None:
        """One round: its candidates scored, its problems kept, and the limit that it met."""
        deadline = self._started + SAMPLING_SHARE * self._gateway.limits.max_seconds
        result = RoundResult()
        call = SamplingCall(
            request=self._request,
            authorization=self._authorization,
            ledger=self._ledger,
            max_tokens=allowance.max_tokens,
            seconds=self._gateway.limits.max_seconds,
        )
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await llm.sample(call, result, count=allowance.count, first_index=first_index)
        except TimeoutError:
            self._limit = "seconds"
        self._problems += result.problems
        if self._is_truncated(result, allowance):
            self._limit = self._limit or allowance.limit
        self._candidates = with_values(
            [*self._candidates, *await self._score(result.candidates)], self._gateway.scoring
        )

    async def _score(self, candidates: Sequence[SampledCandidate]) -> list[SampledCandidate]:
        """The candidates with their scores; without, where the time ends first and earlier ones have theirs."""
        scorable = [candidate for candidate in candidates if candidate.scorable]
        if not scorable:
            return list(candidates)
        seconds_left = self._started + self._gateway.limits.max_seconds - time.monotonic()
        try:
            async with asyncio.timeout(seconds_left):
                instruction = self._request.instruction
                pairs = [(instruction, candidate.text[:MAX_SCORED_CHARACTERS]) for candidate in scorable]
                ratings = await self._gateway.scoring.rate(pairs)
        except TimeoutError:
            self._limit = "seconds"
            if self._best() is not None:
                return list(candidates)
            text = f"candidates are there, but the scorer did not answer within {self._gateway.limits.max_seconds:g} s"
            raise GatewayError(504, f"{text}; raise --max-seconds", kind="timeout", code="timeout") from None
        except CappyError as error:
            raise GatewayError(503, f"the scorer failed: {error}", kind="scorer_error", code="scorer_failed") from error
        scored_by_id = {
            id(candidate): replace(candidate, score=score, logit=logit)
            for candidate, (score, logit) in zip(scorable, ratings, strict=True)
        }
        return [scored_by_id.get(id(candidate), candidate) for candidate in candidates]

    def _allowance(self, llm: Upstream, max_count: int, *, first: bool) -> Allowance:
        """How many of the wanted candidates the limits leave room for."""
        ledger, client_max_tokens = self._ledger, self._request.max_tokens
        prompt_tokens = max((_tokens(usage, "prompt_tokens") for usage in ledger.usages), default=0)
        longest_response = max(
            (candidate.num_tokens or tokens_of(candidate.text) for candidate in self._candidates),
            default=EXPECTED_TOKENS,
        )
        allowance = allow(
            max_count,
            ledger.budgets(),
            llm.llm.prices,
            prompt_tokens=prompt_tokens or tokens_of(self._request.instruction),
            min_tokens=client_max_tokens or longest_response,
            first=first and not self._candidates,
        )
        if client_max_tokens is None or allowance.max_tokens is None or allowance.max_tokens < client_max_tokens:
            return allowance
        return Allowance(allowance.count, client_max_tokens, None)

    def _is_truncated(self, result: RoundResult, allowance: Allowance) -> bool:
        """Whether a candidate ended where the gateway's own limit let it."""
        return allowance.limit is not None and any(
            candidate.choice.get("finish_reason") == "length" for candidate in result.candidates
        )

    def _best(self) -> float | None:
        return max(_values(self._candidates), default=None)

    def _no_candidate_error(self) -> GatewayError:
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
            headers = {"x-should-retry": "false"}
            return GatewayError(429, text, kind="insufficient_quota", code="insufficient_quota", headers=headers)
        text = (
            f"the limit on a request's {self._limit} leaves no room for one candidate; shorten the prompt or raise it"
        )
        return GatewayError(400, text, code="limit_too_low")


def with_values(candidates: Sequence[SampledCandidate], scoring: Scoring) -> list[SampledCandidate]:
    """The candidates with what their scores are worth among all of them; a text that was drawn twice counts once."""
    scores = {index: candidate.score for index, candidate in enumerate(candidates) if candidate.score is not None}
    if not scores:
        return list(candidates)
    calibrated = scoring.calibrate(list(scores.values()), n=len({candidates[index].text for index in scores}))
    values = dict(zip(scores, calibrated, strict=True))
    return [replace(candidate, value=values.get(index)) for index, candidate in enumerate(candidates)]


def _ranking_key(candidate: SampledCandidate) -> tuple[bool, bool, float]:
    """Sorts the best first: whole responses by their logit, then those cut at their limit, then what has no score.

    A scorer reads how good a text is as far as it goes, not whether the rest is missing; a client that gets half an
    answer although a whole one was there is worse off than with one answer alone.
    """
    return candidate.logit is None, candidate.status == "truncated", -(candidate.logit or 0.0)


def _values(candidates: Sequence[SampledCandidate]) -> list[float]:
    """What the candidates that may be given are worth: those of whole responses where there are any."""
    scored_candidates = [(candidate.status, candidate.value) for candidate in candidates if candidate.value is not None]
    whole = [value for status, value in scored_candidates if status != "truncated"]
    return whole or [value for _, value in scored_candidates]


def _tokens(usage: dict[str, object], name: str) -> int:
    count = usage.get(name)
    return count if isinstance(count, int) else 0
