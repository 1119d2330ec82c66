"""Samples candidates from an LLM behind an OpenAI-compatible server and passes on its list of models.

Calls are never streamed, even if the client streams, because a response that the server ends with an error
(`finish_reason: error` or an `error` object) is not a candidate.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx2

from cappy.reasoning import has_reasoning, strip_reasoning
from cappy.records.instance import Status
from cappy.sampling.endpoint import answers
from cappy.sampling.endpoint.address import base_address, join_path, key_headers
from cappy.sampling.endpoint.client import MAX_BYTES, async_settings, max_connections
from cappy.sampling.endpoint.faults import (
    MAX_COMPLETION_TOKENS,
    MAX_TOKENS,
    Capabilities,
    may_refuse_field,
    refused_parameter,
)
from cappy.sampling.endpoint.limits import MAX_LIST_BYTES, answer_bytes
from cappy.sampling.generators import estimate_tokens
from cappy.untrusted import is_utf8
from serving.gateway.errors import (
    GatewayError,
    answer_error,
    body_as_utf8,
    mask_key,
    network_error,
    refusal_error,
    secrets_of,
    timeout_error,
    utf8_error,
)
from serving.gateway.policy import Ledger, Prices, read_usage
from serving.gateway.requests import ChatRequest
from serving.gateway.scoring import SampledCandidate

CONNECT_SECONDS = 10.0
MAX_REMEMBERED_MODELS = 256
"""Clients choose the models' names, so the number of models with remembered capabilities is limited."""
GATEWAY_FIELDS = ("stream", "stream_options", "n")
RESHAPING_FIELDS = ("top_p", "top_k", "min_p")
"""Fields that change nothing at temperature 0, where some servers refuse them."""
GREEDY = "greedy"
"""Name of the capability to decode greedily, at temperature 0."""
LOGGER = logging.getLogger("serving.gateway")
ParsedChoice = tuple[str, Status, list[float]]
"""Text, status and log-probabilities of a choice."""


@dataclass(frozen=True, kw_only=True)
class LLM:
    """An LLM's server; `model`, if set, replaces the client's.

    `key` is sent if it is set. Otherwise the client's Authorization header is sent if `passes_key` is true.
    """

    url: str
    model: str = ""
    key: str = field(default="", repr=False)
    passes_key: bool = True
    prices: Prices = field(default_factory=Prices)

    def authorization(self, client_header: str) -> str:
        """The Authorization header to send; empty for none."""
        return f"Bearer {self.key}" if self.key else client_header if self.passes_key else ""


@dataclass
class RoundResult:
    """Candidates and errors of a round's calls so far."""

    candidates: list[SampledCandidate] = field(default_factory=list)
    problems: list[GatewayError] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class SamplingParameters:
    """The parameters of calls to an LLM; `max_tokens` limits each response (None: only the client's limit applies).

    With `wants_likelihoods` log-probabilities are requested, because the selector uses them; the client gets them only
    if it asked for them.
    """

    request: ChatRequest
    authorization: str
    ledger: Ledger
    max_tokens: int | None = None
    seconds: float = 60.0
    wants_likelihoods: bool = False

    def body(
        self, model: str, *, count: int, first_index: int, greedy: bool = False
    ) -> tuple[dict[str, Any], frozenset[str]]:
        """The body for `count` samples from `first_index` on, and the names of fields that the client did not send.

        With `greedy`, the temperature is 0 whatever the client sent.
        """
        left_out = (*GATEWAY_FIELDS, *(RESHAPING_FIELDS if greedy else ()))
        payload = {name: value for name, value in self.request.body.items() if name not in left_out}
        payload["model"] = model
        added_fields = set()
        if count > 1:
            payload["n"] = count
            added_fields.add("n")
        if greedy:
            payload["temperature"] = 0
        if self.wants_likelihoods and not payload.get("logprobs"):
            payload["logprobs"] = True
            added_fields.add("logprobs")
        if self.request.seed is not None:
            payload["seed"] = self.request.seed + first_index
        if self.max_tokens is not None:
            client_fields = [name for name in (MAX_TOKENS, MAX_COMPLETION_TOKENS) if payload.get(name)]
            max_tokens = min(self.max_tokens, self.request.max_tokens or self.max_tokens)
            payload |= dict.fromkeys(client_fields or [MAX_TOKENS], max_tokens)
            added_fields |= set() if client_fields else {MAX_TOKENS, MAX_COMPLETION_TOKENS}
        return payload, frozenset(added_fields)


class Upstream:
    """A client of one LLM's server with at most `connections` open connections (default: `max_connections()`).

    With `strip_reasoning` the LLM's reasoning is removed from candidates.
    """

    def __init__(
        self, llm: LLM, *, name: str = "the LLM", connections: int | None = None, strip_reasoning: bool = False
    ) -> None:
        self.llm = llm
        self._base = base_address(llm.url)
        self._strips_reasoning = strip_reasoning
        self._has_warned = False
        self._name = name
        self._capabilities: dict[str, Capabilities] = {}
        num_connections = connections or max_connections()
        limits = httpx2.Limits(max_connections=num_connections, max_keepalive_connections=min(64, num_connections))
        self._client = httpx2.AsyncClient(limits=limits, **async_settings())

    async def close(self) -> None:
        """Closes all connections."""
        await self._client.aclose()

    async def sample(
        self,
        parameters: SamplingParameters,
        result: RoundResult,
        *,
        count: int,
        first_index: int,
        greedy_first: bool = False,
    ) -> None:
        """Adds `count` candidates to `result` as they arrive, and a problem for each failed call.

        Uses one call with `n` unless the model refuses or ignores `n`, else one concurrent call per candidate. With
        `greedy_first` the first candidate is decoded greedily, in a concurrent call of its own, if the model can.
        """
        capabilities = self._capabilities_of(self.llm.model or parameters.request.model)
        if greedy_first and capabilities.supports(GREEDY):
            async with asyncio.TaskGroup() as group:
                group.create_task(self._sample_greedily(parameters, capabilities, result, first_index=first_index))
                if count > 1:
                    group.create_task(self.sample(parameters, result, count=count - 1, first_index=first_index + 1))
            return
        if count > 1 and not capabilities.supports("n"):
            async with asyncio.TaskGroup() as group:
                for index in range(count):
                    group.create_task(self.sample(parameters, result, count=1, first_index=first_index + index))
            return
        try:
            candidates, num_answered = await self._call(parameters, capabilities, count=count, first_index=first_index)
        except GatewayError as problem:
            result.problems.append(problem)
            return
        result.candidates += candidates
        if num_answered < count:
            capabilities.mark_unsupported("n")
            await self.sample(parameters, result, count=count - num_answered, first_index=first_index + num_answered)

    async def _sample_greedily(
        self, parameters: SamplingParameters, capabilities: Capabilities, result: RoundResult, *, first_index: int
    ) -> None:
        """Adds a greedy candidate to `result`, or a sampled one if the call is refused."""
        try:
            candidates, _ = await self._call(parameters, capabilities, count=1, first_index=first_index, greedy=True)
        except GatewayError as problem:
            result.problems.append(problem)
            return
        result.candidates += [replace(candidate, greedy=True) for candidate in candidates]
        if not candidates:
            await self.sample(parameters, result, count=1, first_index=first_index)

    async def models(self, authorization: str) -> bytes:
        """The server's list of models as JSON; raises GatewayError on failure."""
        key = self.llm.authorization(authorization)
        response = await self._send("GET", "/models", None, key, seconds=CONNECT_SECONDS, max_bytes=MAX_LIST_BYTES)
        if response.status_code != 200:
            raise refusal_error(self._name, response, secrets_of(key))
        body = mask_key(body_as_utf8(response), key)
        if not is_utf8(body):
            raise utf8_error(self._name)
        return body

    async def _call(
        self,
        parameters: SamplingParameters,
        capabilities: Capabilities,
        *,
        count: int,
        first_index: int,
        greedy: bool = False,
    ) -> tuple[list[SampledCandidate], int]:
        """The candidates of one call and the number of its choices, including those that ended with an error.

        Returns no candidates if the server refuses `n` or the greedy call; raises GatewayError if there is none.
        """
        model = self.llm.model or parameters.request.model
        body, added_fields = parameters.body(model, count=count, first_index=first_index, greedy=greedy)
        key = self.llm.authorization(parameters.authorization)
        while True:
            payload = _trim_body(body, capabilities, added_fields)
            response = await self._call_within_budget(parameters, payload, key, count)
            if response.status_code == 200:
                return self._read_response(parameters, mask_key(body_as_utf8(response), key), payload, count)
            problem = refusal_error(self._name, response, secrets_of(key))
            parameter = refused_parameter(payload, str(problem), problem.error["param"])
            # Another call may know of the refusal meanwhile; this one was sent with the field all the same.
            if parameter in added_fields and parameter in payload and may_refuse_field(response.status_code):
                capabilities.mark_unsupported(str(parameter))
                parameters.ledger.uncount_call()
                if parameter == "n":
                    return [], 0
                if _trim_body(body, capabilities, added_fields) != payload:
                    continue
            elif greedy and response.status_code in (400, 422):
                if parameter == "temperature":
                    capabilities.mark_unsupported(GREEDY)
                parameters.ledger.uncount_call()
                return [], 0
            raise problem

    async def _call_within_budget(
        self, parameters: SamplingParameters, payload: Mapping[str, object], key: str, count: int
    ) -> httpx2.Response:
        """Makes one call; reserves its maximum cost, and settles it if the call fails."""
        max_cost, max_bytes = self._max_cost(parameters, count), _max_bytes(parameters, payload, count)
        parameters.ledger.reserve(max_cost)
        try:
            response = await self._send(
                "POST", "/chat/completions", payload, key, seconds=parameters.seconds, max_bytes=max_bytes
            )
        except GatewayError as problem:
            parameters.ledger.fail(max_cost, may_be_billed=problem.may_be_billed)
            raise
        except BaseException:
            # Cancelled by the time limit or because the client disconnected.
            parameters.ledger.fail(max_cost, may_be_billed=True)
            raise
        if response.status_code != 200:
            parameters.ledger.fail(max_cost, may_be_billed=False)
        return response

    def _max_cost(self, parameters: SamplingParameters, count: int) -> float:
        tokens = parameters.max_tokens if parameters.max_tokens is not None else parameters.request.max_tokens or 0
        return self.llm.prices.cost(estimate_tokens(parameters.request.instruction), count * tokens)

    def _read_response(
        self, parameters: SamplingParameters, body: bytes, payload: Mapping[str, Any], count: int
    ) -> tuple[list[SampledCandidate], int]:
        """Reads the candidates and the number of choices from a body; adds its usage to the ledger.

        Raises GatewayError if there is no candidate: 502, or the status in the body's error object.
        """
        try:
            values, choices = answers.read_choices(body)
            choices = choices[:count]
            responses = _read_choices(choices)
        except answers.NotACompletionError as error:
            parameters.ledger.fail(self._max_cost(parameters, count), may_be_billed=True)
            keys = secrets_of(self.llm.authorization(parameters.authorization))
            raise answer_error(self._name, error, keys) from None
        self._settle(parameters, values.get("usage"), [text for _, (text, _, _) in responses], count)
        model = answers.model_name(values.get("model")) or str(payload["model"])
        candidates = [
            SampledCandidate(
                choice=_to_chat_choice(choice, text, with_logprobs=bool(parameters.request.body.get("logprobs"))),
                text=text,
                status=status,
                model=model,
                generator=f"openai:{payload['model']}@{self.llm.url}",
                seed=payload.get("seed"),
                logprob_sum=sum(logprobs) if logprobs else None,
                num_tokens=len(logprobs) or None,
            )
            for choice, (text, status, logprobs) in responses
        ]
        return [self._strip_reasoning(candidate) for candidate in candidates], len(choices)

    def _strip_reasoning(self, candidate: SampledCandidate) -> SampledCandidate:
        """Removes the reasoning from a candidate if that is enabled; otherwise warns once.

        If nothing remains, the choice is unchanged and the candidate's status is `empty`.
        """
        if not has_reasoning(candidate.text):
            return candidate
        if not self._strips_reasoning:
            if not self._has_warned:
                warning = "%s returns reasoning in its text, which is scored too; --strip-reasoning removes it"
                LOGGER.warning(warning, self._name)
            self._has_warned = True
            return candidate
        text = strip_reasoning(candidate.text)
        if not text:
            status: Status = "empty" if candidate.scorable else candidate.status
            return replace(candidate, text="", status=status, logprob_sum=None, num_tokens=None)
        message = {**candidate.choice["message"], "content": text}
        # Log-probabilities include the tokens of the reasoning.
        choice = {**candidate.choice, "message": message, "logprobs": None}
        return replace(candidate, text=text, choice=choice, logprob_sum=None, num_tokens=None)

    def _settle(self, parameters: SamplingParameters, values: object, texts: list[str], count: int) -> None:
        """Counts the usage that the server reports, or an estimate if it reports none."""
        usage = read_usage(values)
        if usage is not None:
            parameters.ledger.usages.append(usage.counts)
            prompt, completion = usage.prompt, usage.completion
        else:
            prompt, completion = estimate_tokens(parameters.request.instruction), sum(map(estimate_tokens, texts))
            parameters.ledger.unmetered += 1
        parameters.ledger.settle(
            self._max_cost(parameters, count), prompt, completion, self.llm.prices.cost(prompt, completion)
        )

    async def _send(
        self, method: str, path: str, body: Mapping[str, object] | None, key: str, *, seconds: float, max_bytes: int
    ) -> httpx2.Response:
        connect = min(CONNECT_SECONDS, seconds)
        timeout = httpx2.Timeout(seconds, connect=connect, pool=connect)
        # As bytes, because a client's header may have characters that are invalid in a string header.
        items = key_headers(self._base, key).items()
        headers = {name.lower().encode(): value.encode("latin-1", "replace") for name, value in items}
        address, extensions = join_path(self._base, path), {MAX_BYTES: max_bytes}
        try:
            # The timeouts above restart with every byte that arrives.
            async with asyncio.timeout(seconds):
                return await self._client.request(
                    method, address, json=body, headers=headers, timeout=timeout, extensions=extensions
                )
        except TimeoutError:
            raise timeout_error(self._name, seconds) from None
        except httpx2.HTTPError as error:
            raise network_error(self._name, error, seconds, secrets_of(key)) from None

    def _capabilities_of(self, model: str) -> Capabilities:
        if len(self._capabilities) >= MAX_REMEMBERED_MODELS and model not in self._capabilities:
            self._capabilities.clear()
        return self._capabilities.setdefault(model, Capabilities())


def _trim_body(body: Mapping[str, object], capabilities: Capabilities, added_fields: frozenset[str]) -> dict[str, Any]:
    """Removes fields that the model refuses and the client did not send."""
    client_fields = {name: value for name, value in body.items() if name not in added_fields}
    return {**client_fields, **capabilities.trim({name: body[name] for name in added_fields if name in body})[0]}


def _max_bytes(parameters: SamplingParameters, payload: Mapping[str, object], count: int) -> int:
    top = payload.get("top_logprobs")
    likelihoods = 1 + (min(top, 20) if isinstance(top, int) and top > 0 else 0) if payload.get("logprobs") else 0
    return answer_bytes(parameters.max_tokens or parameters.request.max_tokens, count, likelihoods=likelihoods)


def _read_choices(choices: Sequence[Mapping[str, object]]) -> list[tuple[Mapping[str, object], ParsedChoice]]:
    """Reads the choices that hold a response; raises IncompleteChoiceError if all ended with an error."""
    responses: list[tuple[Mapping[str, object], ParsedChoice]] = []
    fault: answers.IncompleteChoiceError | None = None
    for choice in choices:
        try:
            responses.append((choice, answers.read_choice(choice)))
        except answers.IncompleteChoiceError as error:
            fault = error
    if fault is not None and not responses:
        raise fault
    return responses


def _to_chat_choice(choice: Mapping[str, object], text: str, *, with_logprobs: bool) -> Mapping[str, object]:
    """The choice with a message, as chat clients expect, even if the server sent only a text."""
    if choice.get("logprobs") and not with_logprobs:
        choice = {**choice, "logprobs": None}
    if isinstance(choice.get("message"), dict):
        return choice
    other_fields = {name: value for name, value in choice.items() if name not in ("message", "text")}
    return {**other_fields, "message": {"role": "assistant", "content": text}}
