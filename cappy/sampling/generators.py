"""The generator interface, the config of endpoints, and the base class of local generators.

Nothing here opens a connection or loads a model.
"""

import hashlib
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from cappy.errors import ConfigError, quote
from cappy.records import Candidate, Instance
from cappy.records.instance import Status
from cappy.sampling.store import DRAWING_VERSION, CandidateStore, Origin, sample_key
from cappy.sampling.strategies import Decoding, decodings_of
from cappy.specs import parse_spec

Api = Literal["chat", "completions"]
CHARACTERS_PER_TOKEN = 4
"""Approximate value for English text and current tokenizers; other scripts need more tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointConfig:
    """Settings, limits and prices of an endpoint; a limit of 0 is off, prices are per million tokens.

    `folder` is the cache of answers (None: in memory only); `run` identifies the run whose budget is spent. `extra`
    names sampling parameters outside OpenAI's API that the server supports; `logprobs` requests log-probabilities. An
    attempt may take `timeout` seconds. A failed request is retried `max_retries` times, with exponential backoff from
    `first_wait` seconds. With `all_may_fail` the run goes on even if every request is refused.
    """

    api: Api = "chat"
    extra: tuple[str, ...] = ()
    logprobs: bool = True
    all_may_fail: bool = False
    concurrency: int = 8
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    max_total_requests: int = 0
    max_total_tokens: int = 0
    max_total_cost: float = 0.0
    price_input: float = 0.0
    price_output: float = 0.0
    timeout: float = 120.0
    max_retries: int = 8
    first_wait: float = 0.5
    folder: Path | None = None
    run: str = ""

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        """Price of these tokens."""
        return (input_tokens * self.price_input + output_tokens * self.price_output) / 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Usage of a generator since it was loaded.

    `requests`, the tokens and `cost` cover requests to a server; `cached` candidates came from stored answers.
    `errors` counts failed attempts; `last_error` is the reason of the last one, as one line without secrets, until the
    server answers again for some time.
    """

    candidates: int = 0
    cached: int = 0
    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    errors: int = 0
    last_error: str = ""
    cost: float = 0.0


@runtime_checkable
class EndpointGenerator(Protocol):
    """A generator that sends requests to a server and counts their usage."""

    @property
    def usage(self) -> Usage:
        """The usage so far."""


def estimate_tokens(text: str) -> int:
    """Approximate number of tokens of a text, from its length."""
    return math.ceil(len(text) / CHARACTERS_PER_TOKEN)


class OnCandidates(Protocol):
    """A progress callback that a generator calls as candidates are completed."""

    def __call__(self, candidates: int, /, *, in_progress: float = 0.0) -> None:
        """Adds completed candidates.

        `in_progress` is the progress on unfinished candidates, as a fractional number of candidates.
        """


def ignore_progress(candidates: int, /, *, in_progress: float = 0.0) -> None:
    """A callback that does nothing."""


class Generator(Protocol):
    """An LLM that samples candidates.

    `name` is its spec; `revision` identifies the weights (a hash or commit; for an endpoint the name of the model).
    """

    name: str
    revision: str

    def check(self, decodings: Sequence[Decoding]) -> None:
        """Raises ConfigError for a decoding that it does not support."""

    def sample(
        self,
        instructions: Sequence[str],
        decodings: Sequence[Decoding],
        *,
        seed: int,
        on_candidates: OnCandidates = ignore_progress,
    ) -> list[list[Candidate]]:
        """The candidates of each instruction, one decoding after another.

        The candidates of an instruction depend on the seed, the instruction and the decoding, not on the other
        instructions. `on_candidates` reports progress.
        """

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, int]] | None:
        """Log-probability sum and token count of the response in each (instruction, response) pair.

        The end token is included. None if the generator cannot compute likelihoods.
        """

    def take_counts(self) -> Mapping[str, int]:
        """Returns the counts for the manifest since the last call, and resets them."""

    def close(self) -> None:
        """Releases the generator's resources; it cannot be used afterwards."""


@dataclass(frozen=True, slots=True)
class SampleRange:
    """Samples to draw: `decoding.num_samples` of them, starting with sample number `first`.

    `position` is the index of the decoding in the requested decodings.
    """

    decoding: Decoding
    first: int = 0
    position: int = 0


class LocalGenerator(ABC):
    """A generator that runs on this machine; after `use_store` it reuses stored candidates.

    Drawing again may give other candidates than the stored ones: logits differ in their last bits between batches,
    which can change the choice between two nearly equal tokens. The batches depend on which rows of a part are drawn
    together.
    """

    name: str
    revision: str

    def __init__(self, name: str, revision: str) -> None:
        self.name = name
        self.revision = revision
        self._num_truncated = 0
        self._store: CandidateStore | None = None

    def use_store(self, work: Path) -> None:
        """Stores candidates in this work folder, and reuses those that it contains."""
        self._store = CandidateStore(work, Origin(generator=self.name, revision=self.revision, version=DRAWING_VERSION))

    def take_counts(self) -> Mapping[str, int]:
        """The number of truncated instructions since the last call, as `cut`."""
        num_truncated, self._num_truncated = self._num_truncated, 0
        return {"cut": num_truncated}

    def close(self) -> None:
        """Closes the store."""
        if self._store is not None:
            self._store.close()

    def check(self, decodings: Sequence[Decoding]) -> None:
        """Every decoding is supported."""
        del decodings

    def sample(
        self,
        instructions: Sequence[str],
        decodings: Sequence[Decoding],
        *,
        seed: int,
        on_candidates: OnCandidates = ignore_progress,
    ) -> list[list[Candidate]]:
        """The candidates of each instruction, one decoding after another, with likelihoods.

        Equal instructions share their candidates.
        """
        self.check(decodings)
        prompts = self._prompts(instructions, max((decoding.max_new_tokens for decoding in decodings), default=0))
        keys = [  # (instructions, decodings)
            [self._key(sample_key(instruction=text, prompt=prompt, seed=seed), decoding) for decoding in decodings]
            for text, prompt in zip(instructions, prompts, strict=True)
        ]
        stored = self._store.get(list(dict.fromkeys(itertools.chain(*keys)))) if self._store else {}
        missing = _missing_samples(keys, decodings, stored)
        num_missing = sum(
            len(indices) * sum(samples.decoding.num_samples for samples in ranges)
            for ranges, indices in missing.items()
        )
        if num_stored := len(instructions) * sum(decoding.num_samples for decoding in decodings) - num_missing:
            on_candidates(num_stored)
        for ranges, indices in missing.items():
            texts, rows = [instructions[index] for index in indices], [prompts[index] for index in indices]
            for batch in self._draw(texts, rows, ranges, seed=seed, on_candidates=on_candidates):
                sets = {
                    (key := keys[indices[row]][samples.position]): (*stored.get(key, ()), *candidates)
                    for row, row_candidates in batch.items()
                    for samples, candidates in zip(ranges, row_candidates, strict=True)
                }
                if self._store is not None:
                    self._store.put(sets)
                stored |= sets
        return [
            [
                candidate
                for key, decoding in zip(own_keys, decodings, strict=True)
                for candidate in stored[key][: decoding.num_samples]
            ]
            for own_keys in keys
        ]

    @abstractmethod
    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, int]] | None:
        """See `Generator.likelihoods`."""

    @abstractmethod
    def _prompts(self, instructions: Sequence[str], reserved: int) -> list[list[int]]:
        """Prompt tokens of each instruction, truncated to leave room for `reserved` more; counts truncated ones."""

    @abstractmethod
    def _draw(
        self,
        instructions: Sequence[str],
        prompts: Sequence[Sequence[int]],
        ranges: Sequence[SampleRange],
        *,
        seed: int,
        on_candidates: OnCandidates,
    ) -> Iterator[dict[int, list[list[Candidate]]]]:
        """Yields finished batches: index of the prompt -> candidates of each range."""

    @staticmethod
    def _is_extendable(decoding: Decoding) -> bool:
        """Whether a larger `num_samples` keeps the first samples, so that only the others need to be drawn."""
        del decoding
        return False

    def _key(self, instruction_key: str, decoding: Decoding) -> str:
        parameters = asdict(decoding)
        # Candidates do not depend on the generator's position.
        del parameters["generator"]
        if self._is_extendable(decoding):
            del parameters["num_samples"]
        return sample_key(question=instruction_key, decoding=parameters)


def _missing_samples(
    keys: Sequence[Sequence[str]], decodings: Sequence[Decoding], stored: Mapping[str, Sequence[Candidate]]
) -> dict[tuple[SampleRange, ...], list[int]]:
    """Indices of instructions, grouped by the samples that they lack; each key is in one group only."""
    missing: dict[tuple[SampleRange, ...], list[int]] = {}
    seen: set[str] = set()
    for index, own_keys in enumerate(keys):
        ranges = []
        for position, (key, decoding) in enumerate(zip(own_keys, decodings, strict=True)):
            first = len(stored.get(key, ()))
            if first < decoding.num_samples and key not in seen:
                seen.add(key)
                rest = replace(decoding, num_samples=decoding.num_samples - first)
                ranges.append(SampleRange(rest, first, position))
        if ranges:
            missing.setdefault(tuple(ranges), []).append(index)
    return missing


def response_status(text: str, *, complete: bool) -> Status:
    """The status of a local LLM's response: `complete` is false if the token limit ended it."""
    if not text:
        return "empty"
    return "ok" if complete else "truncated"


def check_strategy(specs: Sequence[str], decodings: Sequence[Decoding]) -> None:
    """Raises ConfigError if generators and decodings do not fit together; loads nothing."""
    for position, text in enumerate(specs):
        if parse_spec(text).kind == "vllm":
            reject_beams(text, decodings_of(decodings, position))
    duplicate = next((text for text in specs if specs.count(text) > 1), None)
    if duplicate:
        raise ConfigError(f"sampling: --generator {quote(duplicate)} is given twice; remove one")
    num_needed = max((decoding.generator + 1 for decoding in decodings if decoding.generator is not None), default=0)
    unused = next(
        (text for position, text in enumerate(specs) if decodings and not decodings_of(decodings, position)), None
    )
    if unused and num_needed <= len(specs):
        raise ConfigError(
            f"sampling: --strategy has no decoding for --generator {quote(unused)}; it is for {num_needed} generators, "
            "so leave this one out"
        )
    if specs and num_needed > len(specs):
        raise ConfigError(
            f"sampling: --strategy needs {num_needed} generators, got {len(specs)}; name each with --generator"
        )


def reject_beams(name: str, decodings: Sequence[Decoding]) -> None:
    """Raises ConfigError for beam search, which vLLM does not support here."""
    decoding = next((decoding for decoding in decodings if decoding.num_beams > 1), None)
    if decoding:
        raise ConfigError(
            f"{name}: vLLM does not support beam search here ({decoding.name}); choose a --strategy without beams, "
            "such as greedy"
        )


def generator_seed(seed: int, generator: str) -> int:
    """The seed of one generator of a run, below 2**31."""
    digest = hashlib.blake2b(repr((seed, generator)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFF_FFFF


def with_likelihoods(instances: Sequence[Instance], generators: Sequence[Generator]) -> Iterator[Instance]:
    """The instances, their candidates with likelihoods from the first generator that can compute them, if any can."""
    pairs = [(instance.instruction, candidate.response) for instance in instances for candidate in instance.candidates]
    by_generator = (generator.likelihoods(pairs) for generator in generators) if pairs else iter(())
    first = next((likelihoods for likelihoods in by_generator if likelihoods is not None), None)
    if first is None:
        yield from instances
        return
    likelihoods = iter(first)
    for instance in instances:
        own_likelihoods = itertools.islice(likelihoods, len(instance.candidates))
        yield replace(
            instance,
            candidates=tuple(
                replace(candidate, logprob_sum=total, logprob_mean=total / max(count, 1), num_tokens=count)
                for candidate, (total, count) in zip(instance.candidates, own_likelihoods, strict=True)
            ),
        )
