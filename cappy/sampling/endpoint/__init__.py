"""Generator for OpenAI-compatible endpoints: concurrent requests, and a cache of every answer."""

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
from cappy.sampling.endpoint.address import NO_KEY, base_address, refuse_secrets
from cappy.sampling.endpoint.answers import (
    Answer,
    AnswerCache,
    GenerationRequest,
    NotACompletionError,
    answer_key,
    extra_parameters,
    failed_answers,
    read_answers,
)
from cappy.sampling.endpoint.client import Clients, DeadlineExceededError, EndpointClient
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
from cappy.sampling.statistics import unanswered_counts
from cappy.sampling.strategies import Decoding
from cappy.specs import Spec
from cappy.untrusted import to_utf8

_MAX_REASON_CHARACTERS = 200


class RequestSender:
    """Sends generation requests within the limits of the config, with retries; thread-safe."""

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

    def send(self, request: GenerationRequest, sample_numbers: list[int], stop: threading.Event) -> list[Answer]:
        """Answers for the first of these samples, at least one; for all of them if the model supports `n`.

        Raises GeneratorError if the run cannot continue or the budget is used up, and sets `stop` so that the other
        threads raise StoppedError.
        """
        attempt, started = 0, time.monotonic()
        while True:
            answers, fault = self._attempt(request, sample_numbers, stop)
            if fault is None:
                self.refusals.note_answer()
                return answers
            if fault.kind == "drop":
                self.capabilities.mark_unsupported(*fault.parameters, message=fault.reason, sent=fault.sent)
                continue
            self.meter.add_error(truncate(fault.reason, _MAX_REASON_CHARACTERS, self._clients.key))
            if fault.kind == "fail" or (fault.only_if_unanswered and self.refusals.has_answered):
                return self._fail_or_abort(request, sample_numbers, fault, stop)
            attempt += 1
            if fault.kind == "abort":
                raise self._abort_error(fault, attempt, stop)
            if attempt > self._config.max_retries:
                # If other requests were answered meanwhile, the problem is this instruction.
                if self.refusals.has_answered_since(started) or self._send_probe(request, stop) is None:
                    return self._fail_or_abort(request, sample_numbers, fault, stop)
                raise self._abort_error(fault, attempt, stop)
            wait = backoff(attempt, self._config.first_wait)
            # At least as long as the server's Retry-After asks, plus some jitter.
            pause(wait if fault.wait is None else fault.wait + min(wait, 1.0) / 4, stop)

    def _fail_or_abort(
        self, request: GenerationRequest, sample_numbers: list[int], fault: Fault, stop: threading.Event
    ) -> list[Answer]:
        """Failed answers for a refused request. Raises GeneratorError if a probe is refused as well."""
        num_refusals = self.refusals.note_refusal(instruction_only=fault.instruction_only)
        if num_refusals and not self._config.all_may_fail:
            probe_fault = self._send_probe(request, stop)
            if probe_fault is not None and probe_fault.kind in ("fail", "abort"):
                count_text = f"{num_refusals} requests in a row were refused: " if num_refusals > 1 else ""
                raise self._abort_error(replace(fault, reason=f"{count_text}{fault.reason}"), 1, stop)
        return failed_answers(
            fault.status, len(sample_numbers), truncate(fault.reason, _MAX_REASON_CHARACTERS, self._clients.key)
        )

    def _send_probe(self, request: GenerationRequest, stop: threading.Event) -> Fault | None:
        """Sends a harmless instruction with the same decoding; returns its fault, or None if it is answered."""
        _, fault = self._attempt(replace(request, instruction=PROBE), [0], stop)
        if fault is None:
            self.refusals.note_answer()
        return fault

    def _attempt(
        self, request: GenerationRequest, sample_numbers: list[int], stop: threading.Event
    ) -> tuple[list[Answer], Fault | None]:
        reservation = Spending(
            requests=1,
            input_tokens=estimate_tokens(request.instruction),
            output_tokens=self._num_choices(sample_numbers) * request.decoding.max_new_tokens,
        )
        reserved_tokens = reservation.input_tokens + reservation.output_tokens
        full_body = request.body(self._model, self._config, count=len(sample_numbers), number=sample_numbers[0])
        sent: dict[str, object] = {}
        headers: Mapping[str, str] = {}
        fault: Fault | None = None
        answers: list[Answer] = []
        with self.budget.reserve(reservation, stop) as spent:
            pause(max(self._requests.reserve(1), self._tokens.reserve(reserved_tokens)), stop)
            with self._clients.client(stop) as client:
                # Other threads may have learned of unsupported parameters meanwhile.
                count = self._num_choices(sample_numbers)
                try:
                    sent, left_out = self.capabilities.trim(full_body)
                    body, headers = self._send(client, sent, request, count)
                except (openai.OpenAIError, DeadlineExceededError) as error:
                    fault = classify_error(error, sent)
                except NeededParameterError as error:
                    fault = self._needed_parameter_fault(request, error)
                if fault is not None:
                    if fault.kind == "abort" and not (fault.only_if_unanswered and self.refusals.has_answered):
                        # Set before the client is released, so that no other thread sends with it.
                        stop.set()
                    return [], fault
            seed = request.seed + sample_numbers[0] if "seed" in sent else None
            try:
                answers, choices = read_answers(body, request.instruction, count=count, seed=seed, left_out=left_out)
                for answer in answers:
                    spent.add(Spending(answer.requests, answer.input_tokens, answer.output_tokens))
            except NotACompletionError as error:
                fault = classify_error(error, sent, headers)
                if error.usage is not None:
                    # The server generated tokens, so they may be billed.
                    spent.add(Spending(1, *error.usage))
        if fault is None and choices < count:
            self.capabilities.mark_unsupported("n")
        if spent.requests:
            self._tokens.correct(spent.input_tokens + spent.output_tokens - reserved_tokens)
            self.meter.add(requests=1, input_tokens=spent.input_tokens, output_tokens=spent.output_tokens)
        return answers, fault

    def _needed_parameter_fault(self, request: GenerationRequest, error: NeededParameterError) -> Fault:
        name = request.decoding.name
        return Fault(
            kind="abort",
            reason=f"the model refuses {error.values}, which decoding {name} needs ({error.message})",
            remedy="choose a --strategy without it, such as sampling8",
        )

    def _num_choices(self, sample_numbers: list[int]) -> int:
        return len(sample_numbers) if self.capabilities.supports("n") else 1

    def _send(
        self, client: EndpointClient, sent: Mapping[str, object], request: GenerationRequest, count: int
    ) -> tuple[bytes, Mapping[str, str]]:
        """Posts the request; returns body and headers of the response."""
        path = "/chat/completions" if self._config.api == "chat" else "/completions"
        max_bytes = answer_bytes(request.decoding.max_new_tokens, count, likelihoods=1)
        body, headers = client.post(path, sent, max_bytes=max_bytes)
        body = to_utf8(body, headers.get("content-type", ""))
        # A server may echo the request headers; keep the key out of the records.
        redacted_body = body.replace(self._clients.key.encode(), b"***") if self._clients.key != NO_KEY else body
        return redacted_body, headers

    def _abort_error(self, fault: Fault, attempts: int, stop: threading.Event) -> GeneratorError:
        stop.set()
        return GeneratorError(self._abort_message(fault, attempts))

    def _abort_message(self, fault: Fault, attempt: int) -> str:
        reason = truncate(fault.reason, _MAX_REASON_CHARACTERS, self._clients.key)
        attempts_text = f" after {attempt} attempts" if attempt > 1 else ""
        remedy = fault.remedy or "check the address and the network"
        return f"{self.name}: {reason}{attempts_text}; {remedy}, then run the same command again: every answer is kept"


EXTRA_THREADS = 16
"""Maximum number of additional threads, which write answers to disk while other threads send requests."""
PROGRESS_SECONDS = 1.0
"""Maximum time between two calls of `on_candidates` while requests are pending."""
Sample = tuple[GenerationRequest, int]
"""A request and the number of one of its samples."""
Job = tuple[GenerationRequest, list[int]]
"""A request and the numbers of the samples to request together."""


class Endpoint:
    """Samples from an endpoint by chat completions, or by completions if the config says so.

    The API key comes from the environment (`address.api_key`) and never appears in settings, records, files or logs.
    The samples of an instruction are requested together (`n`) until the model refuses or ignores that, then one by one.
    Samples depend only on the instruction, the decoding and the seed, so cached answers stay valid with another part
    size or more instances.
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
        self._reported_errors = 0

    @property
    def usage(self) -> Usage:
        """The usage since this generator was created."""
        return self._sender.meter.usage

    def close(self) -> None:
        """Closes the connections, the cache and the ledger."""
        self._clients.close()
        self._cache.close()
        self._sender.budget.close()

    def check(self, decodings: Sequence[Decoding]) -> None:
        """Raises ConfigError for a decoding that endpoints, or this one, do not support."""
        for decoding in decodings:
            if decoding.num_beams > 1:
                raise ConfigError(
                    f"{self.name}: an endpoint cannot do beam search ({decoding.name}); choose --strategy endpoint8"
                )
            for parameter, value in extra_parameters(decoding).items():
                if value and parameter not in self._config.extra:
                    remedy = (
                        f"set --extra {parameter} if the server supports it (as vLLM does), or use --strategy endpoint8"
                    )
                    raise ConfigError(f"{self.name}: OpenAI's API has no {parameter} for {decoding.name}; {remedy}")

    def sample(
        self,
        instructions: Sequence[str],
        decodings: Sequence[Decoding],
        *,
        seed: int,
        on_candidates: Callable[[int], None] = ignore_progress,
    ) -> list[list[Candidate]]:
        """The candidates of each instruction, one decoding after another, with likelihoods if returned.

        Cached answers are reused, and equal instructions share their candidates. After a GeneratorError the answers of
        finished and pending requests are still in the cache.
        """
        self.check(decodings)
        self._sender.budget.refresh()
        samples = {instruction: self._samples(instruction, decodings, seed) for instruction in instructions}
        distinct = dict.fromkeys(sample for instruction_samples in samples.values() for sample in instruction_samples)
        answers = {sample: answer for sample in distinct if (answer := self._cache.get(self._key(*sample))) is not None}
        self._sender.meter.add(cached=len(answers))
        if answers:
            self._sender.refusals.note_answer()
        on_candidates(len(answers))
        answers |= self._request_all([sample for sample in distinct if sample not in answers], on_candidates)
        on_candidates(sum(map(len, (samples[instruction] for instruction in instructions))) - len(answers))
        for answer in answers.values():
            self._add_counts(answer)
        return [
            [answers[sample].candidate(self.name, self._model, sample[0].decoding) for sample in samples[instruction]]
            for instruction in instructions
        ]

    def pending_samples(
        self, instructions: Sequence[str], decodings: Sequence[Decoding], *, seed: int
    ) -> list[tuple[str, Decoding]]:
        """Instruction and decoding of each sample that has no cached answer, so that `sample` would request it."""
        return [
            (request.instruction, request.decoding)
            for instruction in dict.fromkeys(instructions)
            for request, number in self._samples(instruction, decodings, seed)
            if self._cache.get(self._key(request, number)) is None
        ]

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> None:
        """None: chat endpoints do not return the likelihood of a given response."""

    def take_counts(self) -> Mapping[str, int]:
        """Returns the usage of the answers since the last call, cached ones included, and the failed attempts."""
        errors = self.usage.errors
        counts = {**self._counts, "errors": errors - self._reported_errors}
        counts |= unanswered_counts(self.name, self._reasons)
        self._reported_errors = errors
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
        """Requests these samples concurrently; each answer is written to the cache as soon as it arrives."""
        jobs: dict[GenerationRequest, list[int]] = {}
        for request, number in samples:
            jobs.setdefault(request, []).append(number)
        answers: dict[Sample, Answer] = {}
        stop = threading.Event()
        # More threads than clients, so that a thread can write an answer while another one sends.
        with ThreadPoolExecutor(self._config.concurrency + min(self._config.concurrency, EXTRA_THREADS)) as pool:
            # A queue of finished futures, because `concurrent.futures.wait` checks all futures on every call.
            done: queue.SimpleQueue[Future[list[Job]]] = queue.SimpleQueue()

            def submit(job: Job) -> None:
                pool.submit(self._run_job, job, answers, stop).add_done_callback(done.put)

            try:
                for job in jobs.items():
                    submit(job)
                num_pending, reported = len(jobs), 0
                while num_pending:
                    remaining = _next_result(done)
                    reported, before = len(answers), reported
                    on_candidates(reported - before)
                    for job in remaining or ():
                        submit(job)
                    num_pending += len(remaining) - 1 if remaining is not None else 0
            except BaseException:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return answers

    def _run_job(self, job: Job, results: dict[Sample, Answer], stop: threading.Event) -> list[Job]:
        """Requests the samples of a job; returns jobs for the samples that the model did not return."""
        request, numbers = job
        if len(numbers) > 1 and not self._sender.capabilities.supports("n"):
            return [(request, [number]) for number in numbers]
        try:
            answers = self._sender.send(request, numbers, stop)
        except StoppedError:
            # The thread that set `stop` raises the error.
            return []
        for number, answer in zip(numbers, answers, strict=False):
            if answer.kept:
                self._cache.put(self._key(request, number), answer)
            results[request, number] = answer
        self._sender.meter.add(candidates=len(answers))
        return [(request, [number]) for number in numbers[len(answers) :]]

    def _add_counts(self, answer: Answer) -> None:
        self._counts["requests"] += answer.requests
        self._counts["input_tokens"] += answer.input_tokens
        self._counts["output_tokens"] += answer.output_tokens
        if answer.reason:
            self._reasons[answer.reason] += 1
        for parameter in answer.left_out:
            self._counts[f"not_asked/{self.name}/{parameter}"] += 1


def _next_result(done: queue.SimpleQueue[Future[list[Job]]]) -> list[Job] | None:
    """The remaining jobs of the next finished one; None if none finishes within `PROGRESS_SECONDS`."""
    try:
        future = done.get(timeout=PROGRESS_SECONDS)
    except queue.Empty:
        return None
    return future.result()


def _request_seed(seed: int, decoding: str, instruction: str) -> int:
    digest = hashlib.blake2b(repr((seed, decoding, instruction)).encode(), digest_size=4).digest()
    # Below 2**30, so that seed plus sample number fits in a signed 32-bit integer, as some servers require.
    return int.from_bytes(digest, "little") & 0x3FFF_FFFF


def _zero_counts() -> Counter[str]:
    return Counter(requests=0, input_tokens=0, output_tokens=0)
