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
from cappy.redaction import MIN_SECRET_LENGTH
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
from serving.gateway.errors import GatewayError, bad_answer, late, not_utf8, refusal_error, unreachable
from serving.gateway.policy import Ledger, Prices, read_usage
from serving.gateway.requests import ChatRequest

CONNECT_SECONDS = 10.0
MODELS_KNOWN = 256
"""Of how many models the refusals are remembered; clients choose the names, and memory must not grow with them."""
_OWN = ("stream", "stream_options", "n")
LOGGER = logging.getLogger("serving.gateway")
Read = tuple[str, Status, list[float]]
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

    def authorization(self, of_client: str) -> str:
        """The header to send, empty for none."""
        return f"Bearer {self.key}" if self.key else of_client if self.passes_key else ""


def llm(url: str, *, model: str = "", key_variable: str = "", passes_key: bool = True, prices: Prices) -> LLM:
    """The LLM at an address, its key from the environment; ConfigError where either is none."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{quote(url)}: an LLM's address is http://host:port/v1")
    refuse_secrets(url)
    try:
        httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ConfigError(f"{quote(url)}: is not an address ({error}); an LLM's is http://host:port/v1") from error
    key = key_of(url, key_variable)
    return LLM(url=base_address(url), model=model, key=key, passes_key=passes_key, prices=prices)


def key_of(url: str, variable: str) -> str:
    """The key of a server in a variable of the environment, empty without a variable; ConfigError if it is not set."""
    key = api_key(variable) if variable else ""
    if key == NO_KEY:
        raise ConfigError(f"{variable} is not set; put the key of {url} there, or leave the flag out")
    return key


@dataclass(frozen=True, kw_only=True)
class Draw:
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
class Round:
    """What the calls of a round have brought so far."""

    draws: list[Draw] = field(default_factory=list)
    problems: list[GatewayError] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What is asked of an LLM: `most_tokens` bounds each response (None: only by the client's own limit)."""

    request: ChatRequest
    authorization: str
    ledger: Ledger
    most_tokens: int | None = None
    seconds: float = 60.0

    def body(self, model: str, *, count: int, number: int) -> tuple[dict[str, Any], frozenset[str]]:
        """The body for `count` samples from `number` on, and the names of what the client has not asked for."""
        sent = {name: value for name, value in self.request.body.items() if name not in _OWN}
        sent["model"] = model
        added = set()
        if count > 1:
            sent["n"] = count
            added.add("n")
        if self.request.seed is not None:
            sent["seed"] = self.request.seed + number
        if self.most_tokens is not None:
            own = [name for name in (LENGTH, NEW_LENGTH) if sent.get(name)]
            sent |= dict.fromkeys(own or [LENGTH], min(self.most_tokens, self.request.most_tokens or self.most_tokens))
            added |= set() if own else {LENGTH, NEW_LENGTH}
        return sent, frozenset(added)


class Upstream:
    """Asks one LLM's server, over connections that are kept open: `connections` at most, else `max_connections()`.

    With `strip_reasoning` a candidate is the answer that follows the LLM's reasoning, and is passed on as that.
    """

    def __init__(
        self, llm: LLM, *, name: str = "the LLM", connections: int | None = None, strip_reasoning: bool = False
    ) -> None:
        self.llm = llm
        self._base = base_address(llm.url)
        self._strip = strip_reasoning
        self._warned = False
        self._name = name
        self._capabilities: dict[str, Capabilities] = {}
        most = connections or max_connections()
        limits = httpx2.Limits(max_connections=most, max_keepalive_connections=min(64, most))
        self._client = httpx2.AsyncClient(limits=limits, **async_settings())

    async def close(self) -> None:
        """Closes all connections."""
        await self._client.aclose()

    async def draw(self, ask: Ask, drawn: Round, *, count: int, number: int) -> None:
        """Adds `count` candidates to `drawn` as they come, and a problem for each call that brought none.

        They are asked for together until the model refuses `n` or ignores it, then one by one, all at once.
        """
        capabilities = self._capabilities_of(self.llm.model or ask.request.model)
        if count > 1 and not capabilities.takes("n"):
            async with asyncio.TaskGroup() as group:
                for index in range(count):
                    group.create_task(self.draw(ask, drawn, count=1, number=number + index))
            return
        try:
            draws, answered = await self._call(ask, capabilities, count=count, number=number)
        except GatewayError as problem:
            drawn.problems.append(problem)
            return
        drawn.draws += draws
        if answered < count:
            capabilities.refuse("n")
            await self.draw(ask, drawn, count=count - answered, number=number + answered)

    async def models(self, authorization: str) -> bytes:
        """The server's list of models, JSON as it answers; GatewayError where it does not."""
        key = self.llm.authorization(authorization)
        response = await self._send("GET", "/models", None, key, seconds=CONNECT_SECONDS, max_bytes=MAX_LIST_BYTES)
        if response.status_code != 200:
            raise refusal_error(self._name, response, _secrets(key))
        body = _without(_in_utf8(response), key)
        if not is_utf8(body):
            raise not_utf8(self._name)
        return body

    async def _call(self, ask: Ask, capabilities: Capabilities, *, count: int, number: int) -> tuple[list[Draw], int]:
        """The candidates of one request, at least one, and how many were answered, those given up included.

        None if the model refuses `n`; GatewayError if there is no candidate.
        """
        wanted, added = ask.body(self.llm.model or ask.request.model, count=count, number=number)
        key = self.llm.authorization(ask.authorization)
        while True:
            sent = _trim_body(wanted, capabilities, added)
            response = await self._ask_within_budget(ask, sent, key, count)
            if response.status_code == 200:
                return self._read(ask, _without(_in_utf8(response), key), sent, count)
            problem = refusal_error(self._name, response, _secrets(key))
            parameter = refused_parameter(sent, str(problem), problem.error["param"])
            if response.status_code not in (400, 422) or parameter not in added or not capabilities.takes(parameter):
                raise problem
            capabilities.refuse(parameter)
            ask.ledger.withdraw()
            if parameter == "n":
                return [], 0

    async def _ask_within_budget(self, ask: Ask, sent: Mapping[str, object], key: str, count: int) -> httpx2.Response:
        """The response to one request; what it may cost is held meanwhile, and settled if it is none or a refusal."""
        most = self._most(ask, count)
        ask.ledger.hold(most)
        try:
            response = await self._send(
                "POST", "/chat/completions", sent, key, seconds=ask.seconds, max_bytes=_max_bytes(ask, sent, count)
            )
        except GatewayError as problem:
            ask.ledger.fail(most, paid=problem.paid)
            raise
        except BaseException:
            # Cancelled: by the limit on time, or because the client is gone.
            ask.ledger.fail(most, paid=True)
            raise
        if response.status_code != 200:
            ask.ledger.fail(most, paid=False)
        return response

    def _most(self, ask: Ask, count: int) -> float:
        """The most that a request can cost."""
        tokens = ask.most_tokens if ask.most_tokens is not None else ask.request.most_tokens or 0
        return self.llm.prices.cost(tokens_of(ask.request.instruction), count * tokens)

    def _read(self, ask: Ask, body: bytes, sent: Mapping[str, Any], count: int) -> tuple[list[Draw], int]:
        """The candidates in a body and how many choices it has; its tokens go to the ledger.

        GatewayError, 502 or the status that an error object in the body states, if it holds no candidate.
        """
        try:
            values, choices = read_choices(body)
            choices = choices[:count]
            responses = _good_choices(choices)
        except BadAnswerError as error:
            ask.ledger.fail(self._most(ask, count), paid=True)
            keys = _secrets(self.llm.authorization(ask.authorization))
            raise bad_answer(self._name, error, keys) from None
        self._settle(ask, values.get("usage"), [text for _, (text, _, _) in responses], count)
        model = model_name(values.get("model")) or str(sent["model"])
        draws = [
            Draw(
                choice=_to_chat_choice(choice, text),
                text=text,
                status=status,
                model=model,
                generator=f"openai:{sent['model']}@{self.llm.url}",
                seed=sent.get("seed"),
                logprob_sum=sum(logprobs) if logprobs else None,
                num_tokens=len(logprobs) or None,
            )
            for choice, (text, status, logprobs) in responses
        ]
        return [self._strip_reasoning(draw) for draw in draws], len(choices)

    def _strip_reasoning(self, draw: Draw) -> Draw:
        """The candidate without its reasoning where that is wanted; where it is not, the log warns of it once.

        Where nothing would be left the choice stays as it is, and the candidate is `empty`.
        """
        if not has_reasoning(draw.text):
            return draw
        if not self._strip:
            if not self._warned:
                LOGGER.warning(
                    "%s answers with reasoning in the text, which is scored too; --strip-reasoning removes it",
                    self._name,
                )
            self._warned = True
            return draw
        text = strip_reasoning(draw.text)
        if not text:
            return replace(
                draw, text="", status="empty" if draw.scorable else draw.status, logprob_sum=None, num_tokens=None
            )
        message = {**draw.choice["message"], "content": text}
        # Log-probabilities are of all tokens, those of the reasoning too.
        choice = {**draw.choice, "message": message, "logprobs": None}
        return replace(draw, text=text, choice=choice, logprob_sum=None, num_tokens=None)

    def _settle(self, ask: Ask, sent: object, texts: list[str], count: int) -> None:
        """Counts what the server says was used; its cost by the rule of thumb where it does not say."""
        usage = read_usage(sent)
        if usage is not None:
            ask.ledger.usages.append(usage.counts)
            prompt, completion = usage.prompt, usage.completion
        else:
            prompt, completion = tokens_of(ask.request.instruction), sum(map(tokens_of, texts))
            ask.ledger.unmetered += 1
        ask.ledger.settle(self._most(ask, count), prompt, completion, self.llm.prices.cost(prompt, completion))

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
            raise late(self._name, seconds) from None
        except httpx2.HTTPError as error:
            raise unreachable(self._name, error, seconds, _secrets(key)) from None

    def _capabilities_of(self, model: str) -> Capabilities:
        if len(self._capabilities) >= MODELS_KNOWN and model not in self._capabilities:
            self._capabilities.clear()
        return self._capabilities.setdefault(model, Capabilities())


def _trim_body(wanted: Mapping[str, object], capabilities: Capabilities, added: frozenset[str]) -> dict[str, Any]:
    """The body without what the model refused and the client has not asked for."""
    theirs = {name: value for name, value in wanted.items() if name not in added}
    return {**theirs, **capabilities.trim({name: wanted[name] for name in added if name in wanted})[0]}


def _max_bytes(ask: Ask, sent: Mapping[str, object], count: int) -> int:
    """How large the answer to a request may be."""
    top = sent.get("top_logprobs")
    likelihoods = 1 + (min(top, 20) if isinstance(top, int) and top > 0 else 0) if sent.get("logprobs") else 0
    return answer_bytes(ask.most_tokens or ask.request.most_tokens, count, likelihoods=likelihoods)


def _good_choices(choices: Sequence[Mapping[str, object]]) -> list[tuple[Mapping[str, object], Read]]:
    """The choices that hold a response, read; GivenUpError where the server gave all of them up."""
    good: list[tuple[Mapping[str, object], Read]] = []
    fault: GivenUpError | None = None
    for choice in choices:
        try:
            good.append((choice, read_choice(choice)))
        except GivenUpError as error:
            fault = error
    if fault is not None and not good:
        raise fault
    return good


def _to_chat_choice(choice: Mapping[str, object], text: str) -> Mapping[str, object]:
    """The choice as clients of chat completions can read it: with a message, even where the server sent a bare text."""
    if isinstance(choice.get("message"), dict):
        return choice
    others = {name: value for name, value in choice.items() if name not in ("message", "text")}
    return {**others, "message": {"role": "assistant", "content": text}}


def _secrets(authorization: str) -> tuple[str, ...]:
    """What of the header must stand in no text."""
    scheme, _, key = authorization.strip().partition(" ")
    secrets = [key.strip() or scheme]
    if scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            secrets.append(base64.b64decode(key).decode("utf-8", "replace").partition(":")[2])
    return tuple(secrets)


def _in_utf8(response: httpx2.Response) -> bytes:
    """The body in UTF-8 where that can be had; as it came where not."""
    return to_utf8(response.content, response.headers.get("content-type", ""))


def _without(body: bytes, authorization: str) -> bytes:
    """The body without the key that was sent, which a server that repeats it would tell every client."""
    for key in _secrets(authorization):
        if len(key) >= MIN_SECRET_LENGTH:
            body = body.replace(key.encode("latin-1", "replace"), b"***")
    return body
