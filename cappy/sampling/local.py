"""Base class of the transformers LLMs that run on this machine: loading, batching by length, candidates."""

import itertools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, Self

import torch
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.utils.logging import disable_progress_bar

from cappy.errors import FolderError
from cappy.model_folder import AutoModel, ModelFolder, Module
from cappy.records import Candidate
from cappy.sampling.drawing import Continuation, Response, continue_rows, draw_uniforms, end_tokens
from cappy.sampling.generators import LocalGenerator, OnCandidates, SampleRange, ignore_progress, response_status
from cappy.sampling.strategies import Decoding

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MAX_LOGITS = 2**26
"""Maximum number of float32 logits in one batch of likelihoods."""
MAX_CPU_WORK = 2**42
"""Maximum of parameters times tokens of a batch on a CPU: about a minute of work. Larger batches are no faster."""


class KeyValueCache(Protocol):
    """The part of transformers' key-value caches that is used here; one row per sequence."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row `repeats` times, copies next to each other."""

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps only these rows."""


class _Output(Protocol):
    logits: torch.Tensor
    """(rows, tokens, vocabulary)."""
    past_key_values: KeyValueCache


class _States(Protocol):
    last_hidden_state: torch.Tensor
    """(rows, tokens, hidden)."""


class _Encoder(Protocol):
    def __call__(self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> _States: ...


class LanguageModel(Module, Protocol):
    """The part of transformers' language models that is used here."""

    config: "PreTrainedConfig"
    generation_config: GenerationConfig

    def __call__(self, **inputs: object) -> _Output:
        """Runs a forward pass."""

    def forward(self, **inputs: object) -> _Output:
        """The forward pass; its signature lists the inputs that the model accepts."""

    def generate(self, *ids: torch.Tensor, **inputs: object) -> torch.Tensor:
        """Generates tokens: (rows, longest)."""

    def get_encoder(self) -> _Encoder:
        """The encoder of an encoder-decoder."""

    def num_parameters(self) -> int:
        """Number of parameters."""

    def to(self, device: torch.device) -> Self:
        """Moves the weights to a device."""

    def eval(self) -> Self:
        """Switches to evaluation mode."""


class LocalLLM(LocalGenerator):
    """An LLM that transformers loads from a folder: safetensors only, no code from the folder, float32.

    `BATCH_TOKENS` limits a batch (rows times the longest prompt plus response); on a CPU `MAX_CPU_WORK` does too.
    Instructions longer than the model's context are truncated and counted.

    A sample depends on the seed, the instruction, the name of the decoding and its own number, not on the rest of the
    batch except for rounding of the logits. Two instances with the same instruction have the same candidates.
    """

    BATCH_TOKENS = 65_536
    AUTO_MODEL: AutoModel[LanguageModel]

    def __init__(self, name: str, folder: ModelFolder, revision: str = "") -> None:
        config = folder.config()
        super().__init__(name, revision or folder.hash[:12])
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        disable_progress_bar()
        self.tokenizer = folder.tokenizer()
        self.model: LanguageModel
        self.model, missing = folder.model(self.AUTO_MODEL, config)
        if missing:
            raise FolderError(f"{folder.path}: the weights lack {missing[0]}; download the whole model")
        self.model.to(self.device).eval()
        # generate() takes unset parameters from the model's own generation config, so replace that by an empty one.
        self.model.generation_config = GenerationConfig()
        self.end_ids = torch.tensor(end_tokens(self.tokenizer, config, folder.path), device=self.device)
        self._end_set = frozenset(self.end_ids.tolist())
        self.pad_id: int = (
            self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else int(self.end_ids[0])
        )

    @property
    def context(self) -> int | None:
        """Maximum tokens of prompt and response together; None if they share no limit."""
        return None

    def close(self) -> None:
        """Closes the store and frees the weights."""
        super().close()
        vars(self).pop("model", None)

    def respond(
        self,
        instructions: Sequence[str],
        decodings: Sequence[Decoding],
        *,
        seed: int,
        on_candidates: OnCandidates = ignore_progress,
    ) -> list[list[list[Response]]]:
        """Responses as tokens, without using stored candidates: one list of samples per instruction and decoding."""
        prompts = self._prompts(instructions, max(decoding.max_new_tokens for decoding in decodings))
        ranges = [SampleRange(decoding) for decoding in decodings]
        responses: list[list[list[Response]]] = [[] for _ in instructions]
        for batch in self._respond(instructions, prompts, ranges, seed, on_candidates):
            for index, own_responses in batch.items():
                responses[index] = own_responses
        return responses

    @torch.inference_mode()
    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, int]]:
        """Log-probability sum and token count of each response, end token included."""
        responses = [self._tokenize_response(response) for _, response in pairs]
        instructions = list(dict.fromkeys(instruction for instruction, _ in pairs))
        longest = max(map(len, responses), default=0)
        prompts = dict(zip(instructions, self._prompts(instructions, longest), strict=True))
        rows = [(prompts[instruction], response) for (instruction, _), response in zip(pairs, responses, strict=True)]
        budget = min(self._batch_tokens(), MAX_LOGITS // self.model.config.vocab_size)
        results = [(0.0, 0)] * len(pairs)
        for batch in batch_by_length(
            [len(prompt) + len(response) for prompt, response in rows], reserved=0, budget=budget
        ):
            sums = self._logprob_sums([rows[i][0] for i in batch], [rows[i][1] for i in batch])
            for index, total in zip(batch, sums.tolist(), strict=True):
                results[index] = (total, len(rows[index][1]))
        return results

    def _batch_tokens(self) -> int:
        if self.device.type != "cpu":
            return self.BATCH_TOKENS
        return min(self.BATCH_TOKENS, MAX_CPU_WORK // max(1, self.model.num_parameters()))

    def generation_config(self, decoding: Decoding) -> GenerationConfig:
        """All parameters of a beam search; the other decodings do not use `generate`."""
        return GenerationConfig(
            do_sample=False,
            num_beams=decoding.num_beams,
            num_return_sequences=decoding.num_samples,
            max_new_tokens=decoding.max_new_tokens,
            min_new_tokens=decoding.min_new_tokens or None,
            decoder_start_token_id=getattr(self.model.config, "decoder_start_token_id", None),
            eos_token_id=self.end_ids.tolist(),
            pad_token_id=self.pad_id,
        )

    @abstractmethod
    def _tokenize_response(self, text: str) -> list[int]:
        """Tokens of a response text, end token included."""

    @abstractmethod
    def _encode(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The padded input for `_start_rows`, and its mask (prompts, longest)."""

    @abstractmethod
    def _start_rows(self, encoded: torch.Tensor, mask: torch.Tensor, copies: int) -> tuple[Continuation, torch.Tensor]:
        """Starts `copies` rows per prompt; returns them and the first token's logits (prompts * copies, vocabulary)."""

    @abstractmethod
    def _beam_search(
        self,
        prompts: Sequence[Sequence[int]],
        encoded: torch.Tensor,
        mask: torch.Tensor,
        decoding: Decoding,
        on_candidates: OnCandidates,
    ) -> tuple[list[tuple[int, ...]], torch.Tensor]:
        """Beam search: the tokens of all samples, prompt by prompt, and the sums of their log-probabilities (rows,)."""

    @abstractmethod
    def _logprob_sums(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> torch.Tensor:
        """Log-probability sum of each response given its prompt: (rows,)."""

    @staticmethod
    def _is_extendable(decoding: Decoding) -> bool:
        """Whether more samples can be added later: true for sampling, where each has its own random numbers."""
        return decoding.do_sample

    def _draw(
        self,
        instructions: Sequence[str],
        prompts: Sequence[Sequence[int]],
        ranges: Sequence[SampleRange],
        *,
        seed: int,
        on_candidates: OnCandidates,
    ) -> Iterator[dict[int, list[list[Candidate]]]]:
        for batch in self._respond(instructions, prompts, ranges, seed, on_candidates):
            yield {
                index: [
                    [self._candidate(response, samples.decoding, seed) for response in responses]
                    for samples, responses in zip(ranges, batch_responses, strict=True)
                ]
                for index, batch_responses in batch.items()
            }

    def _respond(
        self,
        instructions: Sequence[str],
        prompts: Sequence[Sequence[int]],
        ranges: Sequence[SampleRange],
        seed: int,
        on_candidates: OnCandidates,
    ) -> Iterator[dict[int, list[list[Response]]]]:
        """Yields batches: index of the prompt -> responses of each range."""
        reserved = max(samples.decoding.max_new_tokens for samples in ranges)
        rows = sum(max(samples.decoding.num_samples, samples.decoding.num_beams) for samples in ranges)
        for indices in batch_by_length(
            [len(prompt) for prompt in prompts], reserved=reserved, budget=self._batch_tokens() // rows
        ):
            texts, batch_prompts = [instructions[index] for index in indices], [prompts[index] for index in indices]
            responses = self._respond_batch(texts, batch_prompts, ranges, seed, on_candidates)
            yield dict(zip(indices, responses, strict=True))

    @torch.inference_mode()
    def _respond_batch(
        self,
        instructions: Sequence[str],
        prompts: Sequence[Sequence[int]],
        ranges: Sequence[SampleRange],
        seed: int,
        on_candidates: OnCandidates,
    ) -> list[list[list[Response]]]:
        """The responses of one batch."""
        encoded, mask = self._encode(prompts)
        responses: list[list[list[Response]]] = [[[] for _ in ranges] for _ in prompts]
        for position, samples in enumerate(ranges):
            if samples.decoding.num_beams > 1:
                tokens, sums = self._beam_search(prompts, encoded, mask, samples.decoding, on_candidates)
                on_candidates(len(tokens))
                for row, (row_tokens, total) in enumerate(zip(tokens, sums.tolist(), strict=True)):
                    responses[row // samples.decoding.num_samples][position].append(Response(row_tokens, total))
        sampled = [(position, samples) for position, samples in enumerate(ranges) if samples.decoding.num_beams == 1]
        if sampled:
            positions = [position for position, samples in sampled for _ in range(samples.decoding.num_samples)]
            decodings = [samples.decoding for _, samples in sampled for _ in range(samples.decoding.num_samples)]
            uniforms = [
                row_uniforms
                for text in instructions
                for _, samples in sampled
                for row_uniforms in draw_uniforms(seed, text, samples.decoding, samples.first)
            ]
            model, logits = self._start_rows(encoded, mask, len(decodings))
            continued = continue_rows(model, logits, decodings * len(prompts), uniforms, self.end_ids, on_candidates)
            for row, response in enumerate(continued):
                responses[row // len(decodings)][positions[row % len(decodings)]].append(response)
        return responses

    def _truncate_at_end(self, sequences: torch.Tensor) -> list[tuple[int, ...]]:
        """Tokens of each row (rows, length) up to and including its first end token."""
        rows: list[list[int]] = sequences.tolist()
        stops = [next((i + 1 for i, token in enumerate(row) if token in self._end_set), len(row)) for row in rows]
        return [tuple(row[:stop]) for row, stop in zip(rows, stops, strict=True)]

    def _is_end(self, tokens: Sequence[int]) -> bool:
        return bool(tokens) and tokens[-1] in self._end_set

    def _candidate(self, response: Response, decoding: Decoding, seed: int) -> Candidate:
        text = self.tokenizer.decode(response.tokens, skip_special_tokens=True).strip()
        return Candidate(
            response=text,
            generator=self.name,
            revision=self.revision,
            decoding=decoding.name,
            seed=seed,
            status=response_status(text, complete=self._is_end(response.tokens)),
            logprob_sum=response.logprob_sum,
            logprob_mean=response.logprob_sum / max(len(response.tokens), 1),
            num_tokens=len(response.tokens),
        )


def progress_criteria(decoding: Decoding, rows: int, on_candidates: OnCandidates) -> StoppingCriteriaList:
    """A criterion for `generate` that never stops it and reports progress on `rows` responses after each token."""
    steps = itertools.count(1)

    def step(ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        on_candidates(0, in_progress=rows * min(next(steps) / decoding.max_new_tokens, 1.0))
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    return StoppingCriteriaList([step])


def batch_by_length(lengths: Sequence[int], *, reserved: int, budget: int) -> Iterator[list[int]]:
    """Indices of all lengths, longest first, in batches of similar length.

    A batch has at most `budget` tokens, including padding and `reserved` tokens per row, and at least one row.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    start = 0
    while start < len(order):
        count = max(1, budget // max(1, lengths[order[start]] + reserved))
        yield order[start : start + count]
        start += count


def pad(rows: Sequence[Sequence[int]], fill: int, *, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads rows to equal length: ids and mask, both (rows, longest)."""
    longest = max(map(len, rows))
    paddings = [longest - len(row) for row in rows]
    ids = [
        [fill] * padding + list(row) if left else list(row) + [fill] * padding
        for row, padding in zip(rows, paddings, strict=True)
    ]
    mask = [
        [0] * padding + [1] * len(row) if left else [1] * len(row) + [0] * padding
        for row, padding in zip(rows, paddings, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)
