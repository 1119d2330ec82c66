"""An LLM behind an OpenAI-compatible endpoint as a generator: many requests at once, each answer kept as it comes."""

import hashlib
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from cappy.errors import ConfigError
from cappy.records import Candidate
from cappy.sampling.accounts import unanswered_counts
from cappy.sampling.endpoint.addresses import base_address
from cappy.sampling.endpoint.answers import Answer
from cappy.sampling.endpoint.asking import Asker, Question, beyond
from cappy.sampling.endpoint.cache import Cache, key_of
from cappy.sampling.endpoint.clients import Clients
from cappy.sampling.endpoint.keys import refuse_secrets
from cappy.sampling.endpoint.limits import StoppedError
from cappy.sampling.generators import unheard
from cappy.sampling.paid import Terms, Usage
from cappy.sampling.strategies import Decoding
from cappy.specs import Spec

WRITERS = 16
"""Threads beyond those whose requests are under way, to write answers down."""
TELL_SECONDS = 1.0
"""A person hears of requests under way at least that often."""
Sample = tuple[Question, int]
Job = tuple[Question, list[int]]


class Endpoint:
    """Samples by chat completions, or by completions where the terms say so.

    The key comes from the environment (`keys`) and stands in no setting, record, file or log. Samples of one
    instruction are asked for together (`n`) until the model refuses or ignores that, then one by one. Instances'
    samples depend on nothing but their instruction, the decoding and the seed: neither another part size nor more
    instances make an answer be paid for again.
    """

    def __init__(self, spec: Spec, terms: Terms | None = None) -> None:
        refuse_secrets(spec.url)
        self.name = spec.text
        self.revision = spec.name
        self._model = spec.name
        self._url = base_address(spec.url)
        self._terms = terms or Terms()
        self._clients = Clients(self._url, count=self._terms.concurrency, timeout=self._terms.timeout)
        self._asker = Asker(self.name, self._model, self._clients, self._terms)
        self._cache = Cache(self._terms.folder)
        self._tally = _no_tally()
        self._reasons: Counter[str] = Counter()
        self._errors_told = 0

    @property
    def usage(self) -> Usage:
        """What was used since this object was made."""
        return self._asker.meter.usage

    def close(self) -> None:
        """Closes the connections and the ledger."""
        self._clients.close()
        self._asker.budget.close()

    def check(self, decodings: Sequence[Decoding]) -> None:
        """ConfigError for a decoding that no endpoint can do, or not this one."""
        for decoding in decodings:
            if decoding.num_beams > 1:
                raise ConfigError(f"{self.name}: an endpoint cannot do {decoding.name}; choose --strategy endpoint8")
            for knob, value in beyond(decoding).items():
                if value and knob not in self._terms.extra:
                    remedy = f"say --extra {knob} if its server takes it (vLLM does), or choose --strategy endpoint8"
                    raise ConfigError(f"{self.name}: OpenAI's API has no {knob} for {decoding.name}; {remedy}")

    def sample(
        self,
        instructions: Sequence[str],
        decodings: Sequence[Decoding],
        *,
        seed: int,
        told: Callable[[int], None] = unheard,
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
            self._asker.standing.answered()
        told(len(known))
        known |= self._asked([sample for sample in wanted if sample not in known], told)
        told(sum(map(len, (samples[instruction] for instruction in instructions))) - len(known))
        for answer in known.values():
            self._count(answer)
        return [
            [known[sample].candidate(self.name, self._model, sample[0].decoding) for sample in samples[instruction]]
            for instruction in instructions
        ]

    def unanswered(
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
        told = {**self._tally, "errors": errors - self._errors_told}
        told |= unanswered_counts(self.name, self._reasons)
        self._errors_told = errors
        self._tally, self._reasons = _no_tally(), Counter()
        return told

    def _samples(self, instruction: str, decodings: Sequence[Decoding], seed: int) -> list[Sample]:
        return [
            (Question(instruction=instruction, decoding=decoding, seed=_seed(seed, decoding.name, instruction)), number)
            for decoding in decodings
            for number in range(decoding.num_samples)
        ]

    def _key(self, question: Question, number: int) -> str:
        body = question.body(self._model, self._terms, count=1, number=0)
        return key_of(url=self._url, api=self._terms.api, number=number, body=body)

    def _asked(self, samples: Iterable[Sample], told: Callable[[int], None]) -> dict[Sample, Answer]:
        """The answers to these samples, each on the disk as soon as it is there; `told` hears of them at once."""
        jobs: dict[Question, list[int]] = {}
        for question, number in samples:
            jobs.setdefault(question, []).append(number)
        found: dict[Sample, Answer] = {}
        stop = threading.Event()
        # Beside the clients' threads some that write: while one writes an answer down, another asks.
        with ThreadPoolExecutor(self._terms.concurrency + min(self._terms.concurrency, WRITERS)) as pool:
            # A queue of what is done: waiting for the first of many futures looks at all of them, every time.
            done: queue.SimpleQueue[Future[list[Job]]] = queue.SimpleQueue()

            def submit(job: Job) -> None:
                pool.submit(self._ask, job, found, stop).add_done_callback(done.put)

            try:
                for job in jobs.items():
                    submit(job)
                pending, heard = len(jobs), 0
                while pending:
                    left = _next(done)
                    heard, before = len(found), heard
                    told(heard - before)
                    for job in left or ():
                        submit(job)
                    pending += len(left) - 1 if left is not None else 0
            except BaseException:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return found

    def _ask(self, job: Job, found: dict[Sample, Answer], stop: threading.Event) -> list[Job]:
        """Asks for the samples of a job; what is left of it, one by one, where the model answered fewer."""
        question, numbers = job
        if len(numbers) > 1 and not self._asker.capabilities.takes("n"):
            return [(question, [number]) for number in numbers]
        try:
            answers = self._asker.ask(question, numbers, stop)
        except StoppedError:
            # Why the run ended is told by the one who ended it.
            return []
        for number, answer in zip(numbers, answers, strict=False):
            if answer.kept:
                self._cache.put(self._key(question, number), answer)
            found[question, number] = answer
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
