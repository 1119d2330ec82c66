"""One question to an endpoint, sent until it is answered or the run must end."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import openai

from cappy.errors import GeneratorError
from cappy.redaction import cut
from cappy.sampling.endpoint.answers import Answer, BadAnswerError, failed, read_answers
from cappy.sampling.endpoint.bounded import answer_bytes
from cappy.sampling.endpoint.capabilities import Capabilities, NeededParameterError
from cappy.sampling.endpoint.clients import Client, Clients, LateError
from cappy.sampling.endpoint.faults import PROBE, Fault, Standing, backoff, judge
from cappy.sampling.endpoint.keys import NO_KEY
from cappy.sampling.endpoint.limits import Budget, Pace, Spent, pause
from cappy.sampling.paid import Terms, Usage, tokens_of
from cappy.sampling.strategies import Decoding
from cappy.untrusted import to_utf8

_SHOWN = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """An instruction under a decoding; sample `number` of it has the seed `seed + number`."""

    instruction: str
    decoding: Decoding
    seed: int

    def body(self, model: str, terms: Terms, *, count: int, number: int) -> dict[str, Any]:
        """The request for `count` samples from `number` on; every knob is stated, so that no server's default is."""
        decoding = self.decoding
        body: dict[str, Any] = {
            "model": model,
            "temperature": decoding.temperature if decoding.do_sample else 0.0,
            "top_p": decoding.top_p,
            "max_tokens": decoding.max_new_tokens,
            "seed": self.seed + number,
        }
        if terms.api == "chat":
            body |= {"messages": [{"role": "user", "content": self.instruction}]}
        else:
            body |= {"prompt": self.instruction}
        if terms.logprobs:
            body["logprobs"] = True if terms.api == "chat" else 1
        body |= {knob: value for knob, value in beyond(decoding).items() if knob in terms.extra}
        if not body.get("top_k", 1):
            body["top_k"] = -1
        return {**body, "n": count} if count > 1 else body


def beyond(decoding: Decoding) -> dict[str, float]:
    """The knobs that OpenAI's API lacks, by the names that vLLM's server has for them; 0 where they are off."""
    return {"top_k": decoding.top_k, "min_p": decoding.min_p, "min_tokens": decoding.min_new_tokens}


class Meter:
    """Counts what is used; several threads may count at once."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._lock = threading.Lock()
        self._usage = Usage()

    def add(self, **more: int) -> None:
        """Adds to these fields of the usage."""
        with self._lock:
            now = {name: getattr(self._usage, name) + value for name, value in more.items()}
            self._usage = replace(self._usage, **now)

    @property
    def usage(self) -> Usage:
        """What was counted so far, with its cost."""
        usage = self._usage
        return replace(usage, cost=self._terms.cost(usage.input_tokens, usage.output_tokens))


class Asker:
    """Sends questions for a model, within the terms; safe for any number of threads."""

    def __init__(self, name: str, model: str, clients: Clients, terms: Terms) -> None:
        self.name = name
        self.capabilities = Capabilities()
        self.standing = Standing()
        self.budget = Budget(name, terms)
        self.meter = Meter(terms)
        self._model = model
        self._clients = clients
        self._terms = terms
        self._requests = Pace(terms.requests_per_minute)
        self._tokens = Pace(terms.tokens_per_minute)

    def ask(self, question: Question, numbers: list[int], stop: threading.Event) -> list[Answer]:
        """Answers for the first of these samples, at least one; for all of them where the model takes `n`.

        GeneratorError, one line, where asking on is of no use or the budget is used up; `stop` is set then, and
        StoppedError raised in those who were still to ask.
        """
        attempt, began = 0, time.monotonic()
        while True:
            answers, fault = self._try(question, numbers, stop)
            if fault is None:
                self.standing.answered()
                return answers
            if fault.kind == "without":
                self.capabilities.refuse(*fault.parameters, words=fault.reason, sent=fault.sent)
                continue
            if fault.kind == "unanswered" or (fault.unless_answered and self.standing.has_answered):
                return self._unanswered(question, numbers, fault, stop)
            attempt += 1
            self.meter.add(errors=1)
            if fault.kind == "end":
                raise self._end(fault, attempt, stop)
            if attempt > self._terms.retries:
                # Where others are answered meanwhile it is this instruction that is not.
                if self.standing.answered_since(began) or self._ask_plainly(question, stop) is None:
                    return self._unanswered(question, numbers, fault, stop)
                raise self._end(fault, attempt, stop)
            wait = backoff(attempt, self._terms.first_wait)
            # Never earlier than told, and not all at once.
            pause(wait if fault.wait is None else fault.wait + min(wait, 1.0) / 4, stop)

    def _unanswered(self, question: Question, numbers: list[int], fault: Fault, stop: threading.Event) -> list[Answer]:
        """Failed answers for a refused question; GeneratorError where a plain question is refused as well."""
        in_a_row = self.standing.refused(of_one=fault.of_one)
        if in_a_row and not self._terms.all_may_fail:
            found = self._ask_plainly(question, stop)
            if found is not None and found.kind in ("unanswered", "end"):
                many = f"{in_a_row} requests in a row were refused: " if in_a_row > 1 else ""
                raise self._end(replace(fault, reason=f"{many}{fault.reason}"), 1, stop)
        return failed(fault.status, len(numbers), cut(fault.reason, _SHOWN, self._clients.key))

    def _ask_plainly(self, question: Question, stop: threading.Event) -> Fault | None:
        """What is wrong with a plain question under the same decoding; None where it is answered."""
        _, fault = self._try(replace(question, instruction=PROBE), [0], stop)
        if fault is None:
            self.standing.answered()
        return fault

    def _try(self, question: Question, numbers: list[int], stop: threading.Event) -> tuple[list[Answer], Fault | None]:
        most = Spent(
            requests=1,
            input_tokens=tokens_of(question.instruction),
            output_tokens=self._count(numbers) * question.decoding.max_new_tokens,
        )
        asked = most.input_tokens + most.output_tokens
        wanted = question.body(self._model, self._terms, count=len(numbers), number=numbers[0])
        sent: dict[str, Any] = {}
        headers: Mapping[str, str] = {}
        fault: Fault | None = None
        answers: list[Answer] = []
        with self.budget.hold(most, stop) as spent:
            pause(max(self._requests.turn(1), self._tokens.turn(asked)), stop)
            with self._clients.client(stop) as client:
                # What others learned in the meantime need not be refused again.
                count = self._count(numbers)
                try:
                    sent, left_out = self.capabilities.trimmed(wanted)
                    body, headers = self._send(client, sent, question, count)
                except (openai.OpenAIError, LateError) as error:
                    fault = judge(error, sent)
                except NeededParameterError as error:
                    fault = self._needed(question, error)
                if fault is not None:
                    if fault.kind == "end" and not (fault.unless_answered and self.standing.has_answered):
                        # While the client is still held, so that nobody asks in vain after this.
                        stop.set()
                    return [], fault
            try:
                answers, choices = read_answers(
                    body, question.instruction, count=count, seed=sent.get("seed"), left_out=left_out
                )
                for answer in answers:
                    spent.add(Spent(answer.requests, answer.input_tokens, answer.output_tokens))
            except BadAnswerError as error:
                fault = judge(error, sent, headers)
                if error.usage is not None:
                    # The server has worked for it, so it may be on the bill.
                    spent.add(Spent(1, *error.usage))
        if fault is None and choices < count:
            self.capabilities.refuse("n")
        if spent.requests:
            self._tokens.correct(spent.input_tokens + spent.output_tokens - asked)
            self.meter.add(requests=1, input_tokens=spent.input_tokens, output_tokens=spent.output_tokens)
        return answers, fault

    def _needed(self, question: Question, error: NeededParameterError) -> Fault:
        name = question.decoding.name
        return Fault(
            kind="end",
            reason=f"the model refuses {error.values}, which decoding {name} needs ({error.words})",
            remedy="choose a --strategy without, as sampling8",
        )

    def _count(self, numbers: list[int]) -> int:
        return len(numbers) if self.capabilities.takes("n") else 1

    def _send(
        self, client: Client, sent: Mapping[str, Any], question: Question, count: int
    ) -> tuple[bytes, Mapping[str, str]]:
        """Body and headers of the response; what the body says is for the reader of answers to find out."""
        path = "/chat/completions" if self._terms.api == "chat" else "/completions"
        most = answer_bytes(question.decoding.max_new_tokens, count, likelihoods=1)
        body, headers = client.post(path, sent, max_bytes=most)
        body = to_utf8(body, headers.get("content-type", ""))
        # A server that repeats what it was sent must not get the key into the records.
        hidden = body.replace(self._clients.key.encode(), b"***") if self._clients.key != NO_KEY else body
        return hidden, headers

    def _end(self, fault: Fault, attempts: int, stop: threading.Event) -> GeneratorError:
        stop.set()
        return GeneratorError(self._last_words(fault, attempts))

    def _last_words(self, fault: Fault, attempt: int) -> str:
        reason = cut(fault.reason, _SHOWN, self._clients.key)
        tried = f" after {attempt} attempts" if attempt > 1 else ""
        remedy = fault.remedy or "check the address and the network"
        return f"{self.name}: {reason}{tried}; {remedy}, then run the same command again: every answer is kept"
