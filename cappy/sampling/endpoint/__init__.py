"""An LLM behind an OpenAI-compatible endpoint as a generator: many requests at once, each answer kept as it comes."""

import hashlib
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import openai

from cappy.errors import ConfigError, GeneratorError
from cappy.records import Candidate
from cappy.redaction import truncate
from cappy.sampling.accounts import unanswered_counts
from cappy.sampling.endpoint.answers import (
    Answer,
    BadAnswerError,
    Cache,
    Question,
    beyond,
    failed_answers,
    key_of,
    read_answers,
)
from cappy.sampling.endpoint.client import NO_KEY, Client, Clients, LateError, base_address, refuse_secrets
from cappy.sampling.endpoint.faults import (
    PROBE,
    Capabilities,
    Fault,
    NeededParameterError,
    RefusalCounts,
    backoff,
    judge,
)
from cappy.sampling.endpoint.limits import Budget, Meter, Pace, Spent, StoppedError, answer_bytes, pause
from cappy.sampling.generators import EndpointConfig, Usage, ignore_progress, tokens_of
from cappy.sampling.strategies import Decoding
from cappy.specs import Spec
from cappy.untrusted import to_utf8

_SHOWN = 200


class Asker:
    """Sends questions for a model, within its config; safe for any number of threads."""

    def __init__(self, name: str, model: str, clients: Clients, config: EndpointConfig) -> None:
        self.name = name
        self.capabilities = Capabilities()
        self.standing = RefusalCounts()
        self.budget = Budget(name, config)
        self.meter = Meter(config)
        self._model = model
        self._clients = clients
        self._config = config
        self._requests = Pace(config.requests_per_minute)
        self._tokens = Pace(config.tokens_per_minute)

    def ask(self, question: Question, numbers: list[int], stop: threading.Event) -> list[Answer]:
        """Answers for the first of these samples, at least one; for all of them where the model takes `n`.

        GeneratorError, one line, where asking on is of no use or the budget is used up; `stop` is set then, and
        StoppedError raised in those who were still to ask.
        """
        attempt, began = 0, time.monotonic()
        while True:
            answers, fault = self._try(question, numbers, stop)
            if fault is None:
                self.standing.note_answer()
                return answers
            if fault.kind == "without":
                self.capabilities.refuse(*fault.parameters, words=fault.reason, sent=fault.sent)
                continue
            if fault.kind == "unanswered" or (fault.unless_answered and self.standing.has_answered):
                return self._fail_question(question, numbers, fault, stop)
            attempt += 1
            self.meter.add(errors=1)
            if fault.kind == "end":
                raise self._end(fault, attempt, stop)
            if attempt > self._config.max_retries:
                # Where others are answered meanwhile it is this instruction that is not.
                if self.standing.has_answered_since(began) or self._ask_plainly(question, stop) is None:
                    return self._fail_question(question, numbers, fault, stop)
                raise self._end(fault, attempt, stop)
            wait = backoff(attempt, self._config.first_wait)
            # Never earlier than it asks for, and not all at once.
            pause(wait if fault.wait is None else fault.wait + min(wait, 1.0) / 4, stop)

    def _fail_question(
        self, question: Question, numbers: list[int], fault: Fault, stop: threading.Event
    ) -> list[Answer]:
        """Failed answers for a refused question; GeneratorError where a plain question is refused as well."""
        in_a_row = self.standing.note_refusal(of_one=fault.of_one)
        if in_a_row and not self._config.all_may_fail:
            refusal = self._ask_plainly(question, stop)
            if refusal is not None and refusal.kind in ("unanswered", "end"):
                many = f"{in_a_row} requests in a row were refused: " if in_a_row > 1 else ""
                raise self._end(replace(fault, reason=f"{many}{fault.reason}"), 1, stop)
        return failed_answers(fault.status, len(numbers), truncate(fault.reason, _SHOWN, self._clients.key))

    def _ask_plainly(self, question: Question, stop: threading.Event) -> Fault | None:
        """What is wrong with a plain question under the same decoding; None where it is answered."""
        _, fault = self._try(replace(question, instruction=PROBE), [0], stop)
        if fault is None:
            self.standing.note_answer()
        return fault

    def _try(self, question: Question, numbers: list[int], stop: threading.Event) -> tuple[list[Answer], Fault | None]:
        most = Spent(
            requests=1,
            input_tokens=tokens_of(question.instruction),
            output_tokens=self._count(numbers) * question.decoding.max_new_tokens,
        )
        asked = most.input_tokens + most.output_tokens
        wanted = question.body(self._model, self._config, count=len(numbers), number=numbers[0])
        sent: dict[str, object] = {}
        headers: Mapping[str, str] = {}
        fault: Fault | None = None
        answers: list[Answer] = []
        with self.budget.hold(most, stop) as spent:
            pause(max(self._requests.turn(1), self._tokens.turn(asked)), stop)
            with self._clients.client(stop) as client:
                # What others learned in the meantime need not be refused again.
                count = self._count(numbers)
                try:
                    sent, left_out = self.capabilities.trim(wanted)
                    body, headers = self._send(client, sent, question, count)
                except (openai.OpenAIError, LateError) as error:
                    fault = judge(error, sent)
                except NeededParameterError as error:
                    fault = self._needed_parameter_fault(question, error)
                if fault is not None:
                    if fault.kind == "end" and not (fault.unless_answered and self.standing.has_answered):
                        # While the client is still held, so that nobody asks in vain after this.
                        stop.set()
                    return [], fault
            seed = question.seed + numbers[0] if "seed" in sent else None
            try:
                answers, choices = read_answers(body, question.instruction, count=count, seed=seed, left_out=left_out)
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

    def _needed_parameter_fault(self, question: Question, error: NeededParameterError) -> Fault:
        name = question.decoding.name
        return Fault(
            kind="end",
            reason=f"the model refuses {error.values}, which decoding {name} needs ({error.words})",
            remedy="choose a --strategy without, as sampling8",
        )

    def _count(self, numbers: list[int]) -> int:
        return len(numbers) if self.capabilities.takes("n") else 1

    def _send(
        self, client: Client, sent: Mapping[str, object], question: Question, count: int
    ) -> tuple[bytes, Mapping[str, str]]:
        """Body and headers of the response; what the body says is for the reader of answers to find out."""
        path = "/chat/completions" if self._config.api == "chat" else "/completions"
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
        reason = truncate(fault.reason, _SHOWN, self._clients.key)
        tried = f" after {attempt} attempts" if attempt > 1 else ""
        remedy = fault.remedy or "check the address and the network"
        return f"{self.name}: {reason}{tried}; {remedy}, then run the same command again: every answer is kept"


WRITERS = 16
"""Threads beyond those whose requests are under way, to write answers down."""
TELL_SECONDS = 1.0
"""A person hears of requests under way at least that often."""
Sample = tuple[Question, int]
Job = tuple[Question, list[int]]


class Endpoint:
    """Samples by chat completions, or by completions where the config says so.

    The key comes from the environment (`client.api_key`) and stands in no setting, record, file or log. Samples of one
    instruction are asked for together (`n`) until the model refuses or ignores that, then one by one. Instances'
    samples depend on nothing but their instruction, the decoding and the seed: neither another part size nor more
    instances make an answer be paid for again.
    """

    def __init__(self, spec: Spec, config: EndpointConfig | None = None) -> None:
        refuse_secrets(spec.url)
        self.name = spec.text
        self.revision = spec.name
        self._model = spec.name
        self._url = base_address(spec.url)
        self._config = config or EndpointConfig()
        self._clients = Clients(self._url, count=self._config.concurrency, timeout=self._config.timeout)
        self._asker = Asker(self.name, self._model, self._clients, self._config)
        self._cache = Cache(self._config.folder)
        self._tally = _no_tally()
        self._reasons: Counter[str] = Counter()
        self._errors_counted = 0

    @property
    def usage(self) -> Usage:
        """What was used since this object was made."""
        return self._asker.meter.usage

    def close(self) -> None:
        """Closes the connections, the kept answers and the ledger."""
        self._clients.close()
        self._cache.close()
        self._asker.budget.close()

    def check(self, decodings: Sequence[Decoding]) -> None:
        """ConfigError for a decoding that no endpoint can do, or not this one."""
        for decoding in decodings:
            if decoding.num_beams > 1:
                raise ConfigError(f"{self.name}: an endpoint cannot do {decoding.name}; choose --strategy endpoint8")
            for knob, value in beyond(decoding).items():
                if value and knob not in self._config.extra:
                    remedy = f"say --extra {knob} if its server takes it (vLLM does), or choose --strategy endpoint8"
                    raise ConfigError(f"{self.name}: OpenAI's API has no {knob} for {decoding.name}; {remedy}")

    def sample(
        self,
        instructions: Sequence[str],
        decodings: Sequence[Decoding],
        *,
        seed: int,
        on_drawn: Callable[[int], None] = ignore_progress,
    ) -> list[list[Candidate]]:
        """Candidates per instruction, decoding by decoding; likelihoods where the endpoint gives them.

        What is already known is not asked for; of equal instructions one is asked. GeneratorError ends the run, and
        what was answered before it, or was under way, is kept.
        """
        self.check(decodings)
        self._asker.budget.refresh()
        samples = {instruction: self._samples(instruction, decodings, seed) for instruction in instructions}
        wanted = dict.fromkeys(sample for of_one in samples.values() for sample in of_one)
        known = {sample: answer for sample in wanted if (answer := self._cache.get(self._key(*sample))) is not None}
        self._asker.meter.add(cached=len(known))
        if known:
            self._asker.standing.note_answer()
        on_drawn(len(known))
        known |= self._ask_all([sample for sample in wanted if sample not in known], on_drawn)
        on_drawn(sum(map(len, (samples[instruction] for instruction in instructions))) - len(known))
        for answer in known.values():
            self._count(answer)
        return [
            [known[sample].candidate(self.name, self._model, sample[0].decoding) for sample in samples[instruction]]
            for instruction in instructions
        ]

    def pending_samples(
        self, instructions: Sequence[str], decodings: Sequence[Decoding], *, seed: int
    ) -> list[tuple[str, Decoding]]:
        """What `sample` would ask for: instruction and decoding of each sample that no earlier answer gives."""
        wanted = (
            sample
            for instruction in dict.fromkeys(instructions)
            for sample in self._samples(instruction, decodings, seed)
        )
        return [
            (question.instruction, question.decoding)
            for question, number in wanted
            if self._cache.get(self._key(question, number)) is None
        ]

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> None:
        """None: chat endpoints do not tell how likely a given response is."""

    def tally(self) -> Mapping[str, int]:
        """What the answers since the last call took, earlier ones used again included, and how many attempts failed."""
        errors = self.usage.errors
        counts = {**self._tally, "errors": errors - self._errors_counted}
        counts |= unanswered_counts(self.name, self._reasons)
        self._errors_counted = errors
        self._tally, self._reasons = _no_tally(), Counter()
        return counts

    def _samples(self, instruction: str, decodings: Sequence[Decoding], seed: int) -> list[Sample]:
        return [
            (Question(instruction=instruction, decoding=decoding, seed=_seed(seed, decoding.name, instruction)), number)
            for decoding in decodings
            for number in range(decoding.num_samples)
        ]

    def _key(self, question: Question, number: int) -> str:
        body = question.body(self._model, self._config, count=1, number=0)
        return key_of(url=self._url, api=self._config.api, number=number, body=body)

    def _ask_all(self, samples: Iterable[Sample], on_drawn: Callable[[int], None]) -> dict[Sample, Answer]:
        """The answers to these samples, each on the disk as soon as it is there; `on_drawn` hears of them at once."""
        jobs: dict[Question, list[int]] = {}
        for question, number in samples:
            jobs.setdefault(question, []).append(number)
        answers: dict[Sample, Answer] = {}
        stop = threading.Event()
        # Beside the clients' threads some that write: while one writes an answer down, another asks.
        with ThreadPoolExecutor(self._config.concurrency + min(self._config.concurrency, WRITERS)) as pool:
            # A queue of what is done: waiting for the first of many futures looks at all of them, every time.
            done: queue.SimpleQueue[Future[list[Job]]] = queue.SimpleQueue()

            def submit(job: Job) -> None:
                pool.submit(self._ask, job, answers, stop).add_done_callback(done.put)

            try:
                for job in jobs.items():
                    submit(job)
                pending, counted = len(jobs), 0
                while pending:
                    left = _next(done)
                    counted, before = len(answers), counted
                    on_drawn(counted - before)
                    for job in left or ():
                        submit(job)
                    pending += len(left) - 1 if left is not None else 0
            except BaseException:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return answers

    def _ask(self, job: Job, collected: dict[Sample, Answer], stop: threading.Event) -> list[Job]:
        """Asks for the samples of a job; what is left of it, one by one, where the model answered fewer."""
        question, numbers = job
        if len(numbers) > 1 and not self._asker.capabilities.takes("n"):
            return [(question, [number]) for number in numbers]
        try:
            answers = self._asker.ask(question, numbers, stop)
        except StoppedError:
            # Whoever ended the run says why.
            return []
        for number, answer in zip(numbers, answers, strict=False):
            if answer.kept:
                self._cache.put(self._key(question, number), answer)
            collected[question, number] = answer
        self._asker.meter.add(candidates=len(answers))
        return [(question, [number]) for number in numbers[len(answers) :]]

    def _count(self, answer: Answer) -> None:
        self._tally["requests"] += answer.requests
        self._tally["input_tokens"] += answer.input_tokens
        self._tally["output_tokens"] += answer.output_tokens
        if answer.reason:
            self._reasons[answer.reason] += 1
        for parameter in answer.left_out:
            self._tally[f"not_asked/{self.name}/{parameter}"] += 1


def _next(done: queue.SimpleQueue[Future[list[Job]]]) -> list[Job] | None:
    """What is left of the next job that is done; None if none is for a while."""
    try:
        future = done.get(timeout=TELL_SECONDS)
    except queue.Empty:
        # Nothing may come for long, while errors do.
        return None
    return future.result()


def _seed(seed: int, decoding: str, instruction: str) -> int:
    digest = hashlib.blake2b(repr((seed, decoding, instruction)).encode(), digest_size=4).digest()
    # Room below 2^31 for the numbers of the samples: some servers take 32 bits, signed.
    return int.from_bytes(digest, "little") & 0x3FFF_FFFF


def _no_tally() -> Counter[str]:
    return Counter(requests=0, input_tokens=0, output_tokens=0)
