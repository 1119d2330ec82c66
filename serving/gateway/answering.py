"""Answers one request: samples candidates in rounds, scores them and decides on the outcome."""

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from cappy.errors import CappyError
from cappy.sampling.generators import estimate_tokens
from serving.gateway.config import Policy, SpendingLimits
from serving.gateway.errors import GatewayError
from serving.gateway.policy import (
    EXPECTED_TOKENS,
    Allowance,
    Ledger,
    Limit,
    Stop,
    TotalCost,
    allow,
    decide,
)
from serving.gateway.requests import ChatRequest
from serving.gateway.scoring import (
    SampledCandidate,
    Scoring,
    best_candidate,
    expected_gain_of,
    ranking_key,
    with_values,
)
from serving.gateway.upstream import RoundResult, SamplingParameters, Upstream

SAMPLING_SHARE = 0.9
"""Share of a request's time limit for sampling; the rest is for scoring."""
MAX_SCORED_CHARACTERS = 100_000
"""Characters of a response that are scored: scorers read about a thousand tokens; more would delay other requests."""
MAX_CHARACTERS_IN_LOOP = 5_000
"""Characters of a pool up to which MBR takes about a millisecond, so that it may run in the event loop."""
OutcomeKind = Literal["answered", "abstained", "escalated", "escalation-failed", "unscored"]


@dataclass(frozen=True, kw_only=True)
class GatewayOutcome:
    """The result of a request: its candidates, best first, and their ledger.

    `kind` is `unscored` if no candidate could be scored (refused, filtered or empty): then the LLM's first response is
    returned. `scorer` is the scorer's version.
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
        """The candidate that the selector picks; truncated only if no complete one has a score."""
        return self.candidates[0]


@dataclass(frozen=True, kw_only=True)
class Gateway:
    """Answers requests with an LLM, a scorer and a policy.

    `second_upstream` is the second LLM, which is asked if the best score is below the policy's floor.
    """

    upstream: Upstream
    scoring: Scoring
    policy: Policy = field(default_factory=Policy)
    limits: SpendingLimits = field(default_factory=SpendingLimits)
    second_upstream: Upstream | None = None
    second_candidates: int = 1
    total_cost: TotalCost = field(default_factory=TotalCost)

    async def answer(self, request: ChatRequest, authorization: str) -> GatewayOutcome:
        """Answers a request; raises GatewayError if there is no candidate."""
        return await _Run(self, request, authorization).outcome()

    async def close(self) -> None:
        """Closes all connections and the scorer."""
        await self.scoring.close()
        await self.upstream.close()
        if self.second_upstream is not None:
            await self.second_upstream.close()


class _Run:
    """The work on one request: its candidates, problems and ledger so far."""

    def __init__(self, gateway: Gateway, request: ChatRequest, authorization: str) -> None:
        self._gateway = gateway
        self._request = request
        self._authorization = authorization
        self._ledger = Ledger(gateway.limits, gateway.total_cost)
        self._candidates: list[SampledCandidate] = []
        self._problems: list[GatewayError] = []
        self._limit: Limit | None = None
        self._second_start: int | None = None
        """Index of the first candidate of the second LLM."""
        self._gain = math.inf
        """Expected gain of one more sample of the present LLM."""
        self._started = time.monotonic()

    async def outcome(self) -> GatewayOutcome:
        gateway = self._gateway
        # At temperature 0 all candidates would be the same.
        deterministic = self._request.temperature == 0 and gateway.policy.candidates > self._request.count
        max_candidates = self._request.count if deterministic else gateway.policy.candidates
        stop: Stop = await self._sample(gateway.upstream, max_candidates)
        if not self._candidates:
            raise self._no_candidate_error()
        kind = await self._decide_outcome()
        second = self._second_start if self._second_start is not None else len(self._candidates)
        ranked_candidates = order_pools([self._candidates[:second], self._candidates[second:]])
        return GatewayOutcome(
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
        """Compares the best candidate with the floor; below it, asks the second LLM if there is one."""
        gateway, best = self._gateway, self._best()
        floor = gateway.policy.floor
        if floor is None or (best is not None and best >= floor):
            return "answered" if best is not None else "unscored"
        if gateway.second_upstream is not None:
            num_before = self._second_start = len(self._candidates)
            await self._sample(gateway.second_upstream, gateway.second_candidates)
            return "escalated" if len(self._candidates) > num_before else "escalation-failed"
        return "abstained" if best is not None else "unscored"

    async def _sample(self, upstream: Upstream, max_candidates: int) -> Stop:
        """Samples an LLM in rounds until the policy or a limit stops it."""
        start, num_requested = len(self._candidates), 0
        self._gain = math.inf
        while True:
            candidates = self._candidates[start:]
            best = best_candidate(candidates)
            num_received = len(self._candidates) - start
            decision = decide(
                self._gateway.policy,
                [] if best is None or best.value is None else [best.value],
                gain=self._gain,
                num_requested=num_requested,
                num_received=num_received,
                min_candidates=min(self._request.count, max_candidates),
                max_candidates=max_candidates,
            )
            if decision.stop:
                return decision.stop
            allowance = self._allowance(upstream, decision.count, first=num_requested == 0)
            if not allowance.count:
                self._limit = allowance.limit
                return "limit"
            greedy_first = num_requested == 0 and self._draws_greedily(max_candidates)
            await self._round(upstream, allowance, start, first_index=num_requested, greedy_first=greedy_first)
            num_requested += allowance.count
            if self._limit:
                return "limit"
            if len(self._candidates) - start == num_received:
                return "upstream"

    def _draws_greedily(self, max_candidates: int) -> bool:
        """Whether the first candidate is decoded greedily: only if there are others that are sampled."""
        return self._gateway.policy.greedy and max_candidates > 1 and self._request.temperature != 0

    async def _round(
        self, upstream: Upstream, allowance: Allowance, start: int, *, first_index: int, greedy_first: bool
    ) -> None:
        """Samples and scores one round; records its problems and the limit that it reached.

        `start` is the index of this LLM's first candidate: its candidates are a pool of their own.
        """
        deadline = self._started + SAMPLING_SHARE * self._gateway.limits.max_seconds
        result = RoundResult()
        parameters = SamplingParameters(
            request=self._request,
            authorization=self._authorization,
            ledger=self._ledger,
            max_tokens=allowance.max_tokens,
            seconds=self._gateway.limits.max_seconds,
            wants_likelihoods=self._gateway.scoring.selector.uses_likelihoods,
        )
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await upstream.sample(
                    parameters, result, count=allowance.count, first_index=first_index, greedy_first=greedy_first
                )
        except TimeoutError:
            self._limit = "seconds"
        self._problems += result.problems
        if self._is_truncated(result, allowance):
            self._limit = self._limit or allowance.limit
        pool = [*self._candidates[start:], *await self._score(result.candidates)]
        value = partial(_value, pool, self._gateway.scoring, with_gain=bool(self._gateway.policy.min_gain))
        is_long = sum(len(candidate.text) for candidate in pool) > MAX_CHARACTERS_IN_LOOP
        # MBR compares all texts.
        valued, self._gain = await asyncio.to_thread(value) if is_long else value()
        self._candidates = [*self._candidates[:start], *valued]

    async def _score(self, candidates: Sequence[SampledCandidate]) -> list[SampledCandidate]:
        """Scores candidates; returns them without scores if the time is up and earlier candidates have scores."""
        scorable = [candidate for candidate in candidates if candidate.scorable]
        if not scorable:
            return list(candidates)
        seconds_left = self._started + self._gateway.limits.max_seconds - time.monotonic()
        try:
            async with asyncio.timeout(seconds_left):
                instruction = self._request.instruction
                pairs = [(instruction, candidate.text[:MAX_SCORED_CHARACTERS]) for candidate in scorable]
                scores_and_logits = await self._gateway.scoring.score_with_logits(pairs)
        except TimeoutError:
            self._limit = "seconds"
            if self._best() is not None:
                return list(candidates)
            text = f"the scorer did not score the candidates within {self._gateway.limits.max_seconds:g} s"
            raise GatewayError(504, f"{text}; raise --max-seconds", kind="timeout", code="timeout") from None
        except CappyError as error:
            raise GatewayError(503, f"the scorer failed: {error}", kind="scorer_error", code="scorer_failed") from error
        scored_by_id = {
            id(candidate): replace(candidate, score=score, logit=logit)
            for candidate, (score, logit) in zip(scorable, scores_and_logits, strict=True)
        }
        return [scored_by_id.get(id(candidate), candidate) for candidate in candidates]

    def _allowance(self, upstream: Upstream, max_count: int, *, first: bool) -> Allowance:
        """How many of up to `max_count` candidates the limits allow."""
        ledger, client_max_tokens = self._ledger, self._request.max_tokens
        prompt_tokens = max((_tokens(usage, "prompt_tokens") for usage in ledger.usages), default=0)
        longest_response = max(
            (candidate.num_tokens or estimate_tokens(candidate.text) for candidate in self._candidates),
            default=EXPECTED_TOKENS,
        )
        allowance = allow(
            max_count,
            ledger.budgets(),
            upstream.llm.prices,
            prompt_tokens=prompt_tokens or estimate_tokens(self._request.instruction),
            min_tokens=client_max_tokens or longest_response,
            first=first and not self._candidates,
        )
        if client_max_tokens is None or allowance.max_tokens is None or allowance.max_tokens < client_max_tokens:
            return allowance
        return Allowance(allowance.count, client_max_tokens, None)

    def _is_truncated(self, result: RoundResult, allowance: Allowance) -> bool:
        """Whether a candidate was truncated by the gateway's own limit."""
        return allowance.limit is not None and any(
            candidate.choice.get("finish_reason") == "length" for candidate in result.candidates
        )

    def _best(self) -> float | None:
        """The value of the candidate that the selector picks; None if none could be scored."""
        best = best_candidate(self._candidates)
        return None if best is None else best.value

    def _no_candidate_error(self) -> GatewayError:
        """The error that explains why there is no candidate."""
        if self._problems:
            return self._problems[0]
        limits = self._gateway.limits
        if self._limit == "seconds":
            text = (
                f"the LLM returned no candidate within {SAMPLING_SHARE * limits.max_seconds:g} s; raise --max-seconds"
            )
            return GatewayError(504, text, kind="timeout", code="timeout")
        if self._limit == "total-money":
            text = (
                f"the gateway's budget of {limits.max_total_cost:g} is used up; raise --max-total-cost and restart it"
            )
            headers = {"x-should-retry": "false"}
            return GatewayError(429, text, kind="insufficient_quota", code="insufficient_quota", headers=headers)
        remedy = "raise that limit or shorten the prompt"
        text = f"the request's limit on {self._limit} does not allow a single candidate; {remedy}"
        return GatewayError(400, text, code="limit_too_low")


def _value(
    pool: Sequence[SampledCandidate], scoring: Scoring, *, with_gain: bool
) -> tuple[list[SampledCandidate], float]:
    """The candidates with their values, and the expected gain of one more sample, which takes about as long."""
    valued = with_values(pool, scoring)
    return valued, expected_gain_of(valued, scoring) if with_gain else math.inf


def order_pools(pools: Sequence[Sequence[SampledCandidate]]) -> list[SampledCandidate]:
    """The candidates of several LLMs, best first: the pool whose pick has the highest value comes first.

    Truncated candidates, and then those without a score, come after the others of all pools.
    """

    def value(pool: Sequence[SampledCandidate]) -> float:
        best = best_candidate(pool)
        return -math.inf if best is None or best.value is None else best.value

    ranked = [each for pool in sorted(pools, key=value, reverse=True) for each in sorted(pool, key=ranking_key)]
    return sorted(ranked, key=lambda candidate: (candidate.rank is None, candidate.status == "truncated"))


def _tokens(usage: dict[str, object], name: str) -> int:
    count = usage.get(name)
    return count if isinstance(count, int) else 0
