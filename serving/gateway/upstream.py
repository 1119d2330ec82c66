"""An LLM behind an OpenAI-compatible server: draws candidates, passes the rest through."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import httpx2

from cappy.records.instance import SELECTABLE, Status
from cappy.sampling.endpoint.answers import BadAnswerError, read_choice, read_choices
from cappy.sampling.endpoint.capabilities import LENGTH, NEW_LENGTH, Capabilities, refused_parameter
from cappy.sampling.endpoint.keys import NO_KEY, without
from cappy.sampling.paid import tokens_of
from serving.gateway.errors import GatewayError, refused, unreachable
from serving.gateway.ledger import Ledger
from serving.gateway.llm import LLM
from serving.gateway.schemas import ChatRequest

CONNECT_SECONDS = 10.0
MODELS_KNOWN = 256
"""Of how many models the refusals are remembered; clients choose the names, and memory must not grow with them."""
_OWN = ("stream", "stream_options", "n")


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One candidate: the choice as the server sent it, what the record keeps of it, and its score once it has one.

    `score` is the scorer's, `value` what it is worth by the calibration (the score itself without one).
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
    """Asks one LLM's server, over connections that are kept open."""

    def __init__(self, llm: LLM, *, name: str = "the LLM") -> None:
        self.llm = llm
        self._name = name
        self._capabilities: dict[str, Capabilities] = {}
        self._client = httpx2.AsyncClient(
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64), follow_redirects=False
        )

    async def close(self) -> None:
        """Closes all connections."""
        await self._client.aclose()

    async def draw(self, ask: Ask, found: Round, *, count: int, number: int) -> None:
        """Adds `count` candidates to `found` as they come, and a problem for each call that brought none.

        They are asked for together until the model refuses `n` or ignores it, then one by one, all at once.
        """
        capabilities = self._known(self.llm.model or ask.request.model)
        if count > 1 and not capabilities.takes("n"):
            async with asyncio.TaskGroup() as group:
                for index in range(count):
                    group.create_task(self.draw(ask, found, count=1, number=number + index))
            return
        try:
            draws = await self._call(ask, capabilities, count=count, number=number)
        except GatewayError as problem:
            found.problems.append(problem)
            return
        found.draws += draws
        if len(draws) < count:
            capabilities.refuse("n")
            await self.draw(ask, found, count=count - len(draws), number=number + len(draws))

    async def models(self, authorization: str) -> bytes:
        """The server's list of models, JSON as it answers; GatewayError where it does not."""
        key = self.llm.authorization(authorization)
        response = await self._send("GET", "/models", None, key, seconds=CONNECT_SECONDS)
        if response.status_code != 200:
            raise refused(self._name, response, _secret(key))
        return response.content

    async def _call(self, ask: Ask, capabilities: Capabilities, *, count: int, number: int) -> list[Draw]:
        """The candidates of one request, at least one; none if the model refuses `n`; GatewayError if there is none."""
        wanted, added = ask.body(self.llm.model or ask.request.model, count=count, number=number)
        key = self.llm.authorization(ask.authorization)
        while True:
            sent = _trimmed(wanted, capabilities, added)
            response = await self._metered(ask, sent, key, count)
            if response.status_code == 200:
                return self._read(ask, response.text, sent, count)
            problem = refused(self._name, response, _secret(key))
            parameter = refused_parameter(sent, str(problem), problem.error["param"])
            if response.status_code not in (400, 422) or parameter not in added or not capabilities.takes(parameter):
                raise problem
            capabilities.refuse(parameter)
            ask.ledger.withdraw()
            if parameter == "n":
                return []

    async def _metered(self, ask: Ask, sent: Mapping[str, Any], key: str, count: int) -> httpx2.Response:
        """The response to one request; what it may cost is held meanwhile, and settled if it is none or a refusal."""
        most = self._most(ask, count)
        ask.ledger.hold(most)
        try:
            response = await self._send("POST", "/chat/completions", sent, key, seconds=ask.seconds)
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

    def _read(self, ask: Ask, text: str, sent: Mapping[str, Any], count: int) -> list[Draw]:
        """The candidates in a body, and their tokens in the ledger; GatewayError 502 if it holds none."""
        try:
            values, choices = read_choices(text)
            told = [(choice, read_choice(choice)) for choice in choices[:count]]
        except BadAnswerError as error:
            ask.ledger.fail(self._most(ask, count), paid=True)
            key = self.llm.authorization(ask.authorization)
            what = without(_secret(key), f"{self._name} answered what is no completion: {error}")
            raise GatewayError(502, what, kind="upstream_error", code="upstream_bad_answer", paid=True) from None
        usage = values.get("usage")
        self._settle(ask, usage if isinstance(usage, dict) else None, [text for _, (text, _, _) in told], count)
        model = values["model"] if isinstance(values.get("model"), str) else str(sent["model"])
        return [
            Draw(
                choice=choice,
                text=text,
                status=status,
                model=model,
                generator=f"openai:{sent['model']}@{self.llm.url}",
                seed=sent.get("seed"),
                logprob_sum=sum(logprobs) if logprobs else None,
                num_tokens=len(logprobs) or None,
            )
            for choice, (text, status, logprobs) in told
        ]

    def _settle(self, ask: Ask, usage: dict[str, Any] | None, texts: list[str], count: int) -> None:
        """Counts what the server says was used; its cost by the rule of thumb where it does not say."""
        prompt, completion = ((usage or {}).get(name) for name in ("prompt_tokens", "completion_tokens"))
        if usage is not None and _is_count(prompt) and _is_count(completion):
            ask.ledger.usages.append(usage)
        else:
            prompt, completion = tokens_of(ask.request.instruction), sum(map(tokens_of, texts))
            ask.ledger.unmetered += 1
        ask.ledger.settle(self._most(ask, count), prompt, completion, self.llm.prices.cost(prompt, completion))

    async def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None, key: str, *, seconds: float
    ) -> httpx2.Response:
        timeout = httpx2.Timeout(seconds, connect=min(CONNECT_SECONDS, seconds))
        # As bytes, because a client's header may hold what no text header can.
        headers = {b"authorization": key.encode("latin-1", "replace")} if key else {}
        try:
            return await self._client.request(method, self.llm.url + path, json=body, headers=headers, timeout=timeout)
        except httpx2.HTTPError as error:
            raise unreachable(self._name, error, seconds) from None

    def _known(self, model: str) -> Capabilities:
        if len(self._capabilities) >= MODELS_KNOWN and model not in self._capabilities:
            self._capabilities.clear()
        return self._capabilities.setdefault(model, Capabilities())


def _trimmed(wanted: Mapping[str, Any], capabilities: Capabilities, added: frozenset[str]) -> dict[str, Any]:
    """The body without what the model refused and the client has not asked for."""
    theirs = {name: value for name, value in wanted.items() if name not in added}
    return {**theirs, **capabilities.trimmed({name: wanted[name] for name in added if name in wanted})[0]}


def _is_count(told: object) -> TypeGuard[int]:
    return isinstance(told, int) and not isinstance(told, bool) and told >= 0


def _secret(authorization: str) -> str:
    """What of the header must stand in no text."""
    return authorization.split()[-1] if authorization.strip() else NO_KEY


def scored(draw: Draw, score: float, value: float) -> Draw:
    """The candidate with its score."""
    return replace(draw, score=score, value=value)
