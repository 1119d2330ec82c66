"""An LLM behind an OpenAI-compatible server: draws candidates, passes the rest through.

Calls are never streamed, whatever the client asked for, so a response is judged when it is whole: one that its server
gave up (`finish_reason: error`, an `error` object) is not a candidate.
"""

import asyncio
import base64
import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx2

from cappy.errors import ConfigError, quote
from cappy.reasoning import has_reasoning, strip_reasoning
from cappy.records.instance import SELECTABLE, Status
from cappy.redaction import SHORTEST
from cappy.sampling.endpoint.answers import BadAnswerError, GivenUpError, model_name, read_choice, read_choices
from cappy.sampling.endpoint.client import (
    MAX_BYTES,
    NO_KEY,
    api_key,
    async_settings,
    base_address,
    join_path,
    key_headers,
    max_connections,
    refuse_secrets,
)
from cappy.sampling.endpoint.faults import LENGTH, NEW_LENGTH, Capabilities, refused_parameter
from cappy.sampling.endpoint.limits import MAX_LIST_BYTES, answer_bytes
from cappy.sampling.generators import tokens_of
from cappy.untrusted import is_utf8, to_utf8
from serving.gateway.errors import (
    GatewayError,
    bad_answer_error,
    network_error,
    not_utf8_error,
    refusal_error,
    timeout_error,
)
from serving.gateway.policy import Ledger, Prices, read_usage
from serving.gateway.requests import ChatRequest

CONNECT_SECONDS = 10.0
MAX_REMEMBERED_MODELS = 256
"""Of how many models the refusals are remembered; clients choose the names, and memory must not grow with them."""
GATEWAY_FIELDS = ("stream", "stream_options", "n")
LOGGER = logging.getLogger("serving.gateway")
ReadChoice = tuple[str, Status, list[float]]
"""Text, status and log-probabilities of a choice."""


@dataclass(frozen=True, kw_only=True)
class LLM:
    """Where an LLM is asked: `model` takes the place of the client's where it is set.

    `key` is sent where it is set; else what the client sent as its Authorization, if `passes_key`.
    """

    url: str
    model: str = ""
    key: str = field(default="", repr=False)
    passes_key: bool = True
    prices: Prices = field(default_factory=Prices)

    def authorization(self, client_header: str) -> str:
        """The header to send, empty for none."""
        return f"Bearer {self.key}" if self.key else client_header if self.passes_key else ""


def make_llm(url: str, *, model: str = "", key_variable: str = "", passes_key: bool = True, prices: Prices) -> LLM:
    """The LLM at an address, its key from the environment; ConfigError where either is none."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{quote(url)}: an LLM's address is http://host:port/v1")
    refuse_secrets(url)
    try:
        httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ConfigError(f"{quote(url)}: is not an address ({error}); an LLM's is http://host:port/v1") from error
    key = read_key(url, key_variable)
    return LLM(url=base_address(url), model=model, key=key, passes_key=passes_key, prices=prices)


def read_key(url: str, variable: str) -> str:
    """The key of a server in a variable of the environment, empty without a variable; ConfigError if it is not set."""
    key = api_key(variable) if variable else ""
    if key == NO_KEY:
        raise ConfigError(f"{variable} is not set; put the key of {url} there, or leave the flag out")
    return key


@dataclass(frozen=True, kw_only=True)
class SampledCandidate:
    """One candidate: the choice as the server sent it, what the record keeps of it, and its score once it has one.

    `score` is the scorer's, `logit` the score before its activation, which candidates are ranked by, `value` what the
    score is worth by the calibration as the best of all that were scored so far (the score itself without one).
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

    @property
    def scorable(self) -> bool:
        """Whether a selector may pick it: it is a text, and neither refused nor filtered."""
        return self.status in SELECTABLE


@dataclass
class RoundResult:
    """What the calls of a round have brought so far."""

    candidates: list[SampledCandidate] = field(default_factory=list)
    problems: list[GatewayError] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class SamplingCall:
    """What is asked of an LLM: `most_tokens` bounds each response (None: only by the client's own limit)."""

    request: ChatRequest
    authorization: str
    ledger: Ledger
    max_tokens: int | None = None
    seconds: float = 60.0

    def body(self, model: str, *, count: int, first_index: int) -> tuple[dict[str, Any], frozenset[str]]:
        """The body for `count` samples from `number` on, and the names of what the client has not asked for."""
        payload = {name: value for name, value in self.request.body.items() if name not in GATEWAY_FIELDS}
        payload["model"] = model
        added = set()
        if count > 1:
            payload["n"] = count
            added.add("n")
        if self.request.seed is not None:
            payload["seed"] = self.request.seed + first_index
        if self.max_tokens is not None:
            client_fields = [name for name in (LENGTH, NEW_LENGTH) if payload.get(name)]
            payload |= dict.fromkeys(
                client_fields or [LENGTH], min(self.max_tokens, self.request.max_tokens or self.max_tokens)
            )
            added |= set() if client_fields else {LENGTH, NEW_LENGTH}
        return payload, frozenset(added)


class Upstream:
    """Asks one LLM's server, over connections that are kept open: `connections` at most, else `max_connections()`.

    With `strip_reasoning` a candidate is the answer that follows the LLM's reasoning, and is passed on as that.
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

    async def sample(self, call: SamplingCall, result: RoundResult, *, count: int, first_index: int) -> None:
        """Adds `count` candidates to `drawn` as they come, and a problem for each call that brought none.

        They are asked for together until the model refuses `n` or ignores it, then one by one, all at once.
        """
        capabilities = self._capabilities_of(self.llm.model or call.request.model)
        if count > 1 and not capabilities.takes("n"):
            async with asyncio.TaskGroup() as group:
                for index in range(count):
                    group.create_task(self.sample(call, result, count=1, first_index=first_index + index))
            return
        try:
            candidates, num_answered = await self._call(call, capabilities, count=count, first_index=first_index)
        except GatewayError as problem:
            result.problems.append(problem)
            return
        result.candidates += candidates
        if num_answered < count:
            capabilities.refuse("n")
            await self.sample(call, result, count=count - num_answered, first_index=first_index + num_answered)

    async def models(self, authorization: str) -> bytes:
        """The server's list of models, JSON as it answers; GatewayError where it does not."""
        key = self.llm.authorization(authorization)
        response = await self._send("GET", "/models", None, key, seconds=CONNECT_SECONDS, max_bytes=MAX_LIST_BYTES)
        if response.status_code != 200:
            raise refusal_error(self._name, response, _secrets(key))
        body = _mask_key(_body_as_utf8(response), key)
        if not is_utf8(body):
            raise not_utf8_error(self._name)
        return body

    async def _call(
        self, call: SamplingCall, capabilities: Capabilities, *, count: int, first_index: int
    ) -> tuple[list[SampledCandidate], int]:
        """The candidates of one request, at least one, and how many were answered, those given up included.

        None if the model refuses `n`; GatewayError if there is no candidate.
        """
        body, added = call.body(self.llm.model or call.request.model, count=count, first_index=first_index)
        key = self.llm.authorization(call.authorization)
        while True:
            payload = _trim_body(body, capabilities, added)
            response = await self._call_within_budget(call, payload, key, count)
            if response.status_code == 200:
                return self._read_response(call, _mask_key(_body_as_utf8(response), key), payload, count)
            problem = refusal_error(self._name, response, _secrets(key))
            parameter = refused_parameter(payload, str(problem), problem.error["param"])
            if response.status_code not in (400, 422) or parameter not in added or not capabilities.takes(parameter):
                raise problem
            capabilities.refuse(parameter)
            call.ledger.withdraw()
            if parameter == "n":
                return [], 0

    async def _call_within_budget(
        self, call: SamplingCall, payload: Mapping[str, object], key: str, count: int
    ) -> httpx2.Response:
        """The response to one request; what it may cost is held meanwhile, and settled if it is none or a refusal."""
        max_cost = self._max_cost(call, count)
        call.ledger.reserve(max_cost)
        try:
            response = await self._send(
                "POST",
                "/chat/completions",
                payload,
                key,
                seconds=call.seconds,
                max_bytes=_max_bytes(call, payload, count),
            )
        except GatewayError as problem:
            call.ledger.fail(max_cost, may_be_billed=problem.may_be_billed)
            raise
        except BaseException:
            # Cancelled: by the limit on time, or because the client is gone.
            call.ledger.fail(max_cost, may_be_billed=True)
            raise
        if response.status_code != 200:
            call.ledger.fail(max_cost, may_be_billed=False)
        return response

    def _max_cost(self, call: SamplingCall, count: int) -> float:
        """The most that a request can cost."""
        tokens = call.max_tokens if call.max_tokens is not None else call.request.max_tokens or 0
        return self.llm.prices.cost(tokens_of(call.request.instruction), count * tokens)

    def _read_response(
        self, call: SamplingCall, body: bytes, payload: Mapping[str, Any], count: int
    ) -> tuple[list[SampledCandidate], int]:
        """The candidates in a body and how many choices it has; its tokens go to the ledger.

        GatewayError, 502 or the status that an error object in the body states, if it holds no candidate.
        """
        try:
            values, choices = read_choices(body)
            choices = choices[:count]
            responses = _read_choices(choices)
        except BadAnswerError as error:
            call.ledger.fail(self._max_cost(call, count), may_be_billed=True)
            keys = _secrets(self.llm.authorization(call.authorization))
            raise bad_answer_error(self._name, error, keys) from None
        self._settle(call, values.get("usage"), [text for _, (text, _, _) in responses], count)
        model = model_name(values.get("model")) or str(payload["model"])
        candidates = [
            SampledCandidate(
                choice=_to_chat_choice(choice, text),
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
        """The candidate without its reasoning where that is wanted; where it is not, the log warns of it once.

        Where nothing would be left the choice stays as it is, and the candidate is `empty`.
        """
        if not has_reasoning(candidate.text):
            return candidate
        if not self._strips_reasoning:
            if not self._has_warned:
                LOGGER.warning(
                    "%s answers with reasoning in the text, which is scored too; --strip-reasoning removes it",
                    self._name,
                )
            self._has_warned = True
            return candidate
        text = strip_reasoning(candidate.text)
        if not text:
            return replace(
                candidate,
                text="",
                status="empty" if candidate.scorable else candidate.status,
                logprob_sum=None,
                num_tokens=None,
            )
        message = {**candidate.choice["message"], "content": text}
        # Log-probabilities are of all tokens, those of the reasoning too.
        choice = {**candidate.choice, "message": message, "logprobs": None}
        return replace(candidate, text=text, choice=choice, logprob_sum=None, num_tokens=None)

    def _settle(self, call: SamplingCall, values: object, texts: list[str], count: int) -> None:
        """Counts what the server says was used; its cost by the rule of thumb where it does not say."""
        usage = read_usage(values)
        if usage is not None:
            call.ledger.usages.append(usage.counts)
            prompt, completion = usage.prompt, usage.completion
        else:
            prompt, completion = tokens_of(call.request.instruction), sum(map(tokens_of, texts))
            call.ledger.unmetered += 1
        call.ledger.settle(self._max_cost(call, count), prompt, completion, self.llm.prices.cost(prompt, completion))

    async def _send(
        self, method: str, path: str, body: Mapping[str, object] | None, key: str, *, seconds: float, max_bytes: int
    ) -> httpx2.Response:
        connect = min(CONNECT_SECONDS, seconds)
        timeout = httpx2.Timeout(seconds, connect=connect, pool=connect)
        # As bytes, because a client's header may hold what no text header can.
        headers = {
            name.lower().encode(): value.encode("latin-1", "replace")
            for name, value in key_headers(self._base, key).items()
        }
        address, more = join_path(self._base, path), {MAX_BYTES: max_bytes}
        try:
            # The timeouts above begin anew with every byte that comes.
            async with asyncio.timeout(seconds):
                return await self._client.request(
                    method, address, json=body, headers=headers, timeout=timeout, extensions=more
                )
        except TimeoutError:
            raise timeout_error(self._name, seconds) from None
        except httpx2.HTTPError as error:
            raise network_error(self._name, error, seconds, _secrets(key)) from None

    def _capabilities_of(self, model: str) -> Capabilities:
        if len(self._capabilities) >= MAX_REMEMBERED_MODELS and model not in self._capabilities:
            self._capabilities.clear()
        return self._capabilities.setdefault(model, Capabilities())


def _trim_body(body: Mapping[str, object], capabilities: Capabilities, added: frozenset[str]) -> dict[str, Any]:
    """The body without what the model refused and the client has not asked for."""
    client_fields = {name: value for name, value in body.items() if name not in added}
    return {**client_fields, **capabilities.trim({name: body[name] for name in added if name in body})[0]}


def _max_bytes(call: SamplingCall, payload: Mapping[str, object], count: int) -> int:
    """How large the answer to a request may be."""
    top_logprobs = payload.get("top_logprobs")
    likelihoods = (
        1 + (min(top_logprobs, 20) if isinstance(top_logprobs, int) and top_logprobs > 0 else 0)
        if payload.get("logprobs")
        else 0
    )
    return answer_bytes(call.max_tokens or call.request.max_tokens, count, likelihoods=likelihoods)


def _read_choices(choices: Sequence[Mapping[str, object]]) -> list[tuple[Mapping[str, object], ReadChoice]]:
    """The choices that hold a response, read; GivenUpError where the server gave all of them up."""
    responses: list[tuple[Mapping[str, object], ReadChoice]] = []
    fault: GivenUpError | None = None
    for choice in choices:
        try:
            responses.append((choice, read_choice(choice)))
        except GivenUpError as error:
            fault = error
    if fault is not None and not responses:
        raise fault
    return responses


def _to_chat_choice(choice: Mapping[str, object], text: str) -> Mapping[str, object]:
    """The choice as clients of chat completions can read it: with a message, even where the server sent a bare text."""
    if isinstance(choice.get("message"), dict):
        return choice
    other_fields = {name: value for name, value in choice.items() if name not in ("message", "text")}
    return {**other_fields, "message": {"role": "assistant", "content": text}}


def _secrets(authorization: str) -> tuple[str, ...]:
    """What of the header must stand in no text."""
    scheme, _, key = authorization.strip().partition(" ")
    secrets = [key.strip() or scheme]
    if scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            secrets.append(base64.b64decode(key).decode("utf-8", "replace").partition(":")[2])
    return tuple(secrets)


def _body_as_utf8(response: httpx2.Response) -> bytes:
    """The body in UTF-8 where that can be had; as it came where not."""
    return to_utf8(response.content, response.headers.get("content-type", ""))


def _mask_key(body: bytes, authorization: str) -> bytes:
    """The body without the key that was sent, which a server that repeats it would tell every client."""
    for key in _secrets(authorization):
        if len(key) >= SHORTEST:
            body = body.replace(key.encode("latin-1", "replace"), b"***")
    return body
