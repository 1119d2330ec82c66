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
    AnswerCache,
    BadAnswerError,
    GenerationRequest,
    answer_key,
    extra_parameters,
    failed_answers,
    read_answers,
)
from cappy.sampling.endpoint.client import NO_KEY, Client, Clients, DeadlineExceededError, base_address, refuse_secrets
from cappy.sampling.endpoint.faults import (
    PROBE,
    Capabilities,
    Fault,
    NeededParameterError,
    RefusalCounter,
    backoff,
    classify_error,
)
from cappy.sampling.endpoint.limits import Budget, RateLimiter, Spending, StoppedError, UsageMeter, answer_bytes, pause
from cappy.sampling.generators import EndpointConfig, Usage, estimate_tokens, ignore_progress
from cappy.sampling.strategies import Decoding
from cappy.specs import Spec
from cappy.untrusted import to_utf8

_MAX_REASON_CHARACTERS = 200


class RequestSender:
    """Sends questions for a model, within its config; safe for any number of threads."""

    def __init__(self, name: str, model: str, clients: Clients, config: EndpointConfig) -> None:
        self.name = name
        self.capabilities = Capabilities()
        self.refusals = RefusalCounter()
        self.budget = Budget(name, config)
        self.meter = UsageMeter(config)
        self._model = model
        self._clients = clients
        self._config = config
        self._requests = RateLimiter(config.requests_per_minute)
        self._tokens = RateLimiter(config.tokens_per_minute)

    def send(self, request: GenerationRequest, numbers: list[int], stop: threading.Event) -> list[Answer]:
        """Answers for the first of these samples, at least one; for all of them where the model takes `n`.

        GeneratorError, one line, where asking on is of no use or the budget is used up; `stop` is set then, and
        StoppedError raised in those who were still to ask.
        """
        attempt, began = 0, time.monotonic()
        while True:
            answers, fault = self._attempt(request, numbers, stop)
            if fault is None:
                self.refusals.note_answer()
                return answers
            if fault.kind == "drop":
                self.capabilities.mark_unsupported(*fault.parameters, words=fault.reason, sent=fault.sent)
                continue
            if fault.kind == "fail" or (fault.only_if_unanswered and self.refusals.has_answered):
                return self._fail_or_abort(request, numbers, fault, stop)
            attempt += 1
            self.meter.add(errors=1)
            if fault.kind == "abort":
                raise self._abort_error(fault, attempt, stop)
            if attempt > self._config.max_retries:
                # Where others are answered meanwhile it is this instruction that is not.
                if self.refusals.has_answered_since(began) or self._send_probe(request, stop) is None:
                    return self._fail_or_abort(request, numbers, fault, stop)
                raise self._abort_error(fault, attempt, stop)
            wait = backoff(attempt, self._config.first_wait)
            # Never earlier than it asks for, and not all at once.
            pause(wait if fault.wait is None else fault.wait + min(wait, 1.0) / 4, stop)

    def _fail_or_abort(
        self, request: GenerationRequest, numbers: list[int], fault: Fault, stop: threading.Event
    ) -> list[Answer]:
        """Failed answers for a refused request; GeneratorError where a plain request is refused as well."""
        in_a_row = self.refusals.note_refusal(instruction_only=fault.instruction_only)
        if in_a_row and not self._config.all_may_fail:
            refusal = self._send_probe(request, stop)
            if refusal is not None and refusal.kind in ("fail", "abort"):
                many = f"{in_a_row} requests in a row were refused: " if in_a_row > 1 else ""
                raise self._abort_error(replace(fault, reason=f"{many}{fault.reason}"), 1, stop)
        return failed_answers(
            fault.status, len(numbers), truncate(fault.reason, _MAX_REASON_CHARACTERS, self._clients.key)
        )

    def _send_probe(self, request: GenerationRequest, stop: threading.Event) -> Fault | None:
        """What is wrong with a plain request under the same decoding; None where it is answered."""
        _, fault = self._attempt(replace(request, instruction=PROBE), [0], stop)
        if fault is None:
            self.refusals.note_answer()
        return fault

    def _attempt(
        self, request: GenerationRequest, numbers: list[int], stop: threading.Event
    ) -> tuple[list[Answer], Fault | None]:
        most = Spending(
            requests=1,
            input_tokens=estimate_tokens(request.instruction),
            output_tokens=self._count(numbers) * request.decoding.max_new_tokens,
        )
        asked = most.input_tokens + most.output_tokens
        wanted = request.body(self._model, self._config, count=len(numbers), number=numbers[0])
        sent: dict[str, object] = {}
        headers: Mapping[str, str] = {}
        fault: Fault | None = None
        answers: list[Answer] = []
        with self.budget.reserve(most, stop) as spent:
            pause(max(self._requests.reserve(1), self._tokens.reserve(asked)), stop)
            with self._clients.client(stop) as client:
                # What others learned in the meantime need not be refused again.
                count = self._count(numbers)
                try:
                    sent, left_out = self.capabilities.trim(wanted)
                    body, headers = self._send(client, sent, request, count)
                except (openai.OpenAIError, DeadlineExceededError) as error:
                    fault = classify_error(error, sent)
                except NeededParameterError as error:
                    fault = self._needed_parameter_fault(request, error)
                if fault is not None:
                    if fault.kind == "abort" and not (fault.only_if_unanswered and self.refusals.has_answered):
                        # While the client is still held, so that nobody asks in vain after this.
                        stop.set()
                    return [], fault
            seed = request.seed + numbers[0] if "seed" in sent else None
            try:
                answers, choices = read_answers(body, request.instruction, count=count, seed=seed, left_out=left_out)
                for answer in answers:
                    spent.add(Spending(answer.requests, answer.input_tokens, answer.output_tokens))
            except BadAnswerError as error:
                fault = classify_error(error, sent, headers)
                if error.usage is not None:
                    # The server has worked for it, so it may be on the bill.
                    spent.add(Spending(1, *error.usage))
        if fault is None and choices < count:
            self.capabilities.mark_unsupported("n")
        if spent.requests:
            self._tokens.correct(spent.input_tokens + spent.output_tokens - asked)
            self.meter.add(requests=1, input_tokens=spent.input_tokens, output_tokens=spent.output_tokens)
        return answers, fault

    def _needed_parameter_fault(self, request: GenerationRequest, error: NeededParameterError) -> Fault:
        name = request.decoding.name
        return Fault(
            kind="abort",
            reason=f"the model refuses {error.values}, which decoding {name} needs ({error.words})",
            remedy="choose a --strategy without, as sampling8",
        )

    def _count(self, numbers: list[int]) -> int:
        return len(numbers) if self.capabilities.supports("n") else 1

    def _send(
        self, client: Client, sent: Mapping[str, object], request: GenerationRequest, count: int
    ) -> tuple[bytes, Mapping[str, str]]:
        """Body and headers of the response; what the body says is for the reader of answers to find out."""
        path = "/chat/completions" if self._config.api == "chat" else "/completions"
        most = answer_bytes(request.decoding.max_new_tokens, count, likelihoods=1)
        body, headers = client.post(path, sent, max_bytes=most)
        body = to_utf8(body, headers.get("content-type", ""))
        # A server that repeats what it was sent must not get the key into the records.
        hidden = body.replace(self._clients.key.encode(), b"***") if self._clients.key != NO_KEY else body
        return hidden, headers

    def _abort_error(self, fault: Fault, attempts: int, stop: threading.Event) -> GeneratorError:
        stop.set()
        return GeneratorError(self._abort_message(fault, attempts))

    def _abort_message(self, fault: Fault, attempt: int) -> str:
        reason = truncate(fault.reason, _MAX_REASON_CHARACTERS, self._clients.key)
        tried = f" after {attempt} attempts" if attempt > 1 else ""
        remedy = fault.remedy or "check the address and the network"
        return f"{self.name}: {reason}{tried}; {remedy}, then run the same command again: every answer is kept"


EXTRA_THREADS = 16
"""Threads beyond those whose requests are under way, to write answers down."""
PROGRESS_SECONDS = 1.0
"""A person hears of requests under way at least that often."""
Sample = tuple[GenerationRequest, int]
Job = tuple[GenerationRequest, list[int]]


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
        self._sender = RequestSender(self.name, self._model, self._clients, self._config)
        self._cache = AnswerCache(self._config.folder)
        self._counts = _zero_counts()
        self._reasons: Counter[str] = Counter()
        self._errors_counted = 0

    @property
    def usage(self) -> Usage:
        """What was used since this object was made."""
        return self._sender.meter.usage

    def close(self) -> None:
        """Closes the connections, the kept answers and the ledger."""
        self._clients.close()
        self._cache.close()
        self._sender.budget.close()

    def check(self, decodings: Sequence[Decoding]) -> None:
        """ConfigError for a decoding that no endpoint can do, or not this one."""
        for decoding in decodings:
            if decoding.num_beams > 1:
                raise ConfigError(f"{self.name}: an endpoint cannot do {decoding.name}; choose --strategy endpoint8")
            for knob, value in extra_parameters(decoding).items():
                if value and knob not in self._config.extra:
                    remedy = f"say --extra {knob} if its server takes it (vLLM does), or choose --strategy endpoint8"
                    raise ConfigError(f"{self.name}: OpenAI's API has no {knob} for {decoding.name}; {remedy}")

    def sample(
        self,
        instructions: Sequence[str],
        decodings: Sequence[Decoding],
        *,
        seed: int,
        on_candidates: Callable[[int], None] = ignore_progress,
    ) -> list[list[Candidate]]:
        """Candidates per instruction, decoding by decoding; likelihoods where the endpoint gives them.

        What is already known is not asked for; of equal instructions one is asked. GeneratorError ends the run, and
        what was answered before it, or was under way, is kept.
        """
        self.check(decodings)
        self._sender.budget.refresh()
        samples = {instruction: self._samples(instruction, decodings, seed) for instruction in instructions}
        wanted = dict.fromkeys(sample for instruction_only in samples.values() for sample in instruction_only)
        known = {sample: answer for sample in wanted if (answer := self._cache.get(self._key(*sample))) is not None}
        self._sender.meter.add(cached=len(known))
        if known:
            self._sender.refusals.note_answer()
        on_candidates(len(known))
        known |= self._request_all([sample for sample in wanted if sample not in known], on_candidates)
        on_candidates(sum(map(len, (samples[instruction] for instruction in instructions))) - len(known))
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
            (request.instruction, request.decoding)
            for request, number in wanted
            if self._cache.get(self._key(request, number)) is None
        ]

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> None:
        """None: chat endpoints do not tell how likely a given response is."""

    def take_counts(self) -> Mapping[str, int]:
        """What the answers since the last call took, earlier ones used again included, and how many attempts failed."""
        errors = self.usage.errors
        counts = {**self._counts, "errors": errors - self._errors_counted}
        counts |= unanswered_counts(self.name, self._reasons)
        self._errors_counted = errors
        self._counts, self._reasons = _zero_counts(), Counter()
        return counts

    def _samples(self, instruction: str, decodings: Sequence[Decoding], seed: int) -> list[Sample]:
        return [
            (
                GenerationRequest(
                    instruction=instruction, decoding=decoding, seed=_request_seed(seed, decoding.name, instruction)
                ),
                number,
            )
            for decoding in decodings
            for number in range(decoding.num_samples)
        ]

    def _key(self, request: GenerationRequest, number: int) -> str:
        body = request.body(self._model, self._config, count=1, number=0)
        return answer_key(url=self._url, api=self._config.api, number=number, body=body)

    def _request_all(self, samples: Iterable[Sample], on_candidates: Callable[[int], None]) -> dict[Sample, Answer]:
        """The answers to these samples, each on the disk as soon as it is there; `on_candidates` hears of them at once."""
        jobs: dict[GenerationRequest, list[int]] = {}
        for request, number in samples:
            jobs.setdefault(request, []).append(number)
        answers: dict[Sample, Answer] = {}
        stop = threading.Event()
        # Beside the clients' threads some that write: while one writes an answer down, another asks.
        with ThreadPoolExecutor(self._config.concurrency + min(self._config.concurrency, EXTRA_THREADS)) as pool:
            # A queue of what is done: waiting for the first of many futures looks at all of them, every time.
            done: queue.SimpleQueue[Future[list[Job]]] = queue.SimpleQueue()

            def submit(job: Job) -> None:
                pool.submit(self._run_job, job, answers, stop).add_done_callback(done.put)

            try:
                for job in jobs.items():
                    submit(job)
                pending, counted = len(jobs), 0
                while pending:
                    left = _next_result(done)
                    counted, before = len(answers), counted
                    on_candidates(counted - before)
                    for job in left or ():
                        submit(job)
                    pending += len(left) - 1 if left is not None else 0
            except BaseException:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return answers

    def _run_job(self, job: Job, collected: dict[Sample, Answer], stop: threading.Event) -> list[Job]:
        """Asks for the samples of a job; what is left of it, one by one, where the model answered fewer."""
        request, numbers = job
        if len(numbers) > 1 and not self._sender.capabilities.supports("n"):
            return [(request, [number]) for number in numbers]
        try:
            answers = self._sender.send(request, numbers, stop)
        except StoppedError:
            # Whoever ended the run says why.
            return []
        for number, answer in zip(numbers, answers, strict=False):
            if answer.kept:
                self._cache.put(self._key(request, number), answer)
            collected[request, number] = answer
        self._sender.meter.add(candidates=len(answers))
        return [(request, [number]) for number in numbers[len(answers) :]]

    def _count(self, answer: Answer) -> None:
        self._counts["requests"] += answer.requests
        self._counts["input_tokens"] += answer.input_tokens
        self._counts["output_tokens"] += answer.output_tokens
        if answer.reason:
            self._reasons[answer.reason] += 1
        for parameter in answer.left_out:
            self._counts[f"not_asked/{self.name}/{parameter}"] += 1


def _next_result(done: queue.SimpleQueue[Future[list[Job]]]) -> list[Job] | None:
    """What is left of the next job that is done; None if none is for a while."""
    try:
        future = done.get(timeout=PROGRESS_SECONDS)
    except queue.Empty:
        # Nothing may come for long, while errors do.
        return None
    return future.result()


def _request_seed(seed: int, decoding: str, instruction: str) -> int:
    digest = hashlib.blake2b(repr((seed, decoding, instruction)).encode(), digest_size=4).digest()
    # Room below 2^31 for the numbers of the samples: some servers take 32 bits, signed.
    return int.from_bytes(digest, "little") & 0x3FFF_FFFF


def _zero_counts() -> Counter[str]:
    return Counter(requests=0, input_tokens=0, output_tokens=0)
