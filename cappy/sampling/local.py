"""What the LLMs of transformers that run on this machine share: loading, batches by length, candidates."""

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
"""Logits that one batch of likelihoods may hold, 4 bytes each."""
MAX_CPU_WORK = 2**42
"""Parameters times tokens of a batch on a CPU: it is done within a minute or so, and larger ones are no faster."""


class KeyValueCache(Protocol):
    """Keys and values of what a model has read, a row each; what is used of transformers' caches."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Makes `repeats` rows of each, one beside the other."""

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows alone."""


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
    """What is used of transformers' models with a head for tokens."""

    config: "PreTrainedConfig"
    generation_config: GenerationConfig

    def __call__(self, **inputs: object) -> _Output:
        """One pass."""

    def forward(self, **inputs: object) -> _Output:
        """The same; its signature says which inputs the model takes."""

    def generate(self, *ids: torch.Tensor, **inputs: object) -> torch.Tensor:
        """Tokens of each row: (rows, longest)."""

    def get_encoder(self) -> _Encoder:
        """The encoder of an encoder-decoder."""

    def num_parameters(self) -> int:
        """How many numbers the weights are."""

    def to(self, device: torch.device) -> Self:
        """Moves the weights."""

    def eval(self) -> Self:
        """Without dropout."""


class LocalLLM(LocalGenerator):
    """An LLM of transformers in a folder: safetensors alone, no code of the folder's own, float32.

    `BATCH_TOKENS` bounds a batch: rows times the longest prompt with its response; on a CPU `MAX_CPU_WORK` does too.
    Instructions longer than the model's context lose their end, and are counted.

    What is drawn depends on the seed, the instruction, the decoding's name and the number of the sample, and not on
    what else is asked for, up to the last bits of its batch. Two instances with the same instruction have the same
    candidates.
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
            raise FolderError(f"{folder.path}: its weights lack {missing[0]}; get the whole model")
        self.model.to(self.device).eval()
        # generate() fills whatever a call leaves open from the model's own configuration; an empty one leaks nothing.
        self.model.generation_config = GenerationConfig()
        self.end_ids = torch.tensor(end_tokens(self.tokenizer, config, folder.path), device=self.device)
        self._end_set = frozenset(self.end_ids.tolist())
        self.pad_id: int = (
            self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else int(self.end_ids[0])
        )

    @property
    def context(self) -> int | None:
        """Tokens that a prompt and its response share; None where they share none, or have no bound."""
        return None

    def close(self) -> None:
        """Lets the weights go."""
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
        """Responses as tokens, all drawn now: of each instruction, for each decoding, its samples."""
        prompts = self._prompts(instructions, max(decoding.max_new_tokens for decoding in decodings))
        wanted = [SampleRange(decoding) for decoding in decodings]
        drawn: list[list[list[Response]]] = [[] for _ in instructions]
        for batch in self._respond(instructions, prompts, wanted, seed, on_candidates):
            for place, responses in batch.items():
                drawn[place] = responses
        return drawn

    @torch.inference_mode()
    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, int]]:
        """(sum of log-probabilities, number of tokens) of each given response, end token included."""
        responses = [self._response(response) for _, response in pairs]
        instructions = list(dict.fromkeys(instruction for instruction, _ in pairs))
        most = max(map(len, responses), default=0)
        prompts = dict(zip(instructions, self._prompts(instructions, most), strict=True))
        asked = [(prompts[instruction], response) for (instruction, _), response in zip(pairs, responses, strict=True)]
        budget = min(self._batch_tokens(), MAX_LOGITS // self.model.config.vocab_size)
        known = [(0.0, 0)] * len(pairs)
        for batch in batch_by_length(
            [len(prompt) + len(response) for prompt, response in asked], reserved=0, budget=budget
        ):
            sums = self._sums([asked[i][0] for i in batch], [asked[i][1] for i in batch])
            for place, total in zip(batch, sums.tolist(), strict=True):
                known[place] = (total, len(asked[place][1]))
        return known

    def _batch_tokens(self) -> int:
        if self.device.type != "cpu":
            return self.BATCH_TOKENS
        return min(self.BATCH_TOKENS, MAX_CPU_WORK // max(1, self.model.num_parameters()))

    def generation_config(self, decoding: Decoding) -> GenerationConfig:
        """Every knob of a beam search, stated; the decoding loop of our own needs none."""
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
    def _response(self, text: str) -> list[int]:
        """Tokens of a given response, end token included."""

    @abstractmethod
    def _encode(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """What all responses to these prompts start from, and its mask (prompts, longest)."""

    @abstractmethod
    def _begin(self, encoded: torch.Tensor, mask: torch.Tensor, copies: int) -> tuple[Continuation, torch.Tensor]:
        """Each prompt's `copies` rows, and the logits of their first token: (prompts * copies, vocabulary)."""

    @abstractmethod
    def _beams(
        self,
        prompts: Sequence[Sequence[int]],
        encoded: torch.Tensor,
        mask: torch.Tensor,
        decoding: Decoding,
        on_candidates: OnCandidates,
    ) -> tuple[list[tuple[int, ...]], torch.Tensor]:
        """Tokens of each prompt's samples by beam search, one prompt after the other, and their sums (rows,)."""

    @abstractmethod
    def _sums(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> torch.Tensor:
        """Sum of the log-probabilities of each response's tokens after its prompt: (rows,)."""

    @staticmethod
    def _grows(decoding: Decoding) -> bool:
        """Samples have random numbers of their own; the beams of a search are found together."""
        return decoding.do_sample

    def _draw(
        self,
        instructions: Sequence[str],
        prompts: Sequence[Sequence[int]],
        wanted: Sequence[SampleRange],
        *,
        seed: int,
        on_candidates: OnCandidates,
    ) -> Iterator[dict[int, list[list[Candidate]]]]:
        for batch in self._respond(instructions, prompts, wanted, seed, on_candidates):
            yield {
                place: [
                    [self._candidate(response, one.decoding, seed) for response in responses]
                    for one, responses in zip(wanted, drawn, strict=True)
                ]
                for place, drawn in batch.items()
            }

    def _respond(
        self,
        instructions: Sequence[str],
        prompts: Sequence[Sequence[int]],
        wanted: Sequence[SampleRange],
        seed: int,
        on_candidates: OnCandidates,
    ) -> Iterator[dict[int, list[list[Response]]]]:
        """For each batch the responses of its places."""
        reserved = max(one.decoding.max_new_tokens for one in wanted)
        rows = sum(max(one.decoding.num_samples, one.decoding.num_beams) for one in wanted)
        for places in batch_by_length(
            [len(prompt) for prompt in prompts], reserved=reserved, budget=self._batch_tokens() // rows
        ):
            texts, own = [instructions[place] for place in places], [prompts[place] for place in places]
            drawn = self._respond_together(texts, own, wanted, seed, on_candidates)
            yield dict(zip(places, drawn, strict=True))

    @torch.inference_mode()
    def _respond_together(
        self,
        instructions: Sequence[str],
        prompts: Sequence[Sequence[int]],
        wanted: Sequence[SampleRange],
        seed: int,
        on_candidates: OnCandidates,
    ) -> list[list[list[Response]]]:
        """The responses of one batch."""
        encoded, mask = self._encode(prompts)
        responses: list[list[list[Response]]] = [[[] for _ in wanted] for _ in prompts]
        for place, one in enumerate(wanted):
            if one.decoding.num_beams > 1:
                tokens, sums = self._beams(prompts, encoded, mask, one.decoding, on_candidates)
                on_candidates(len(tokens))
                for number, (own, total) in enumerate(zip(tokens, sums.tolist(), strict=True)):
                    responses[number // one.decoding.num_samples][place].append(Response(own, total))
        drawn = [(place, one) for place, one in enumerate(wanted) if one.decoding.num_beams == 1]
        if drawn:
            places = [place for place, one in drawn for _ in range(one.decoding.num_samples)]
            rows = [one.decoding for _, one in drawn for _ in range(one.decoding.num_samples)]
            numbers = [
                own
                for text in instructions
                for _, one in drawn
                for own in draw_uniforms(seed, text, one.decoding, one.first)
            ]
            model, logits = self._begin(encoded, mask, len(rows))
            given = continue_rows(model, logits, rows * len(prompts), numbers, self.end_ids, on_candidates)
            for number, response in enumerate(given):
                responses[number // len(rows)][places[number % len(rows)]].append(response)
        return responses

    def _cut_at_end(self, sequences: torch.Tensor) -> list[tuple[int, ...]]:
        """Tokens of each row (rows, length) up to and with its first end token."""
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
            status=response_status(text, ended=self._is_end(response.tokens)),
            logprob_sum=response.logprob_sum,
            logprob_mean=response.logprob_sum / max(len(response.tokens), 1),
            num_tokens=len(response.tokens),
        )


def progress_criteria(decoding: Decoding, rows: int, on_candidates: OnCandidates) -> StoppingCriteriaList:
    """For `generate`: stops nothing, and says after each token how much of `rows` responses is done."""
    steps = itertools.count(1)

    def step(ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        on_candidates(0, in_progress=rows * min(next(steps) / decoding.max_new_tokens, 1.0))
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    return StoppingCriteriaList([step])


def batch_by_length(lengths: Sequence[int], *, reserved: int, budget: int) -> Iterator[list[int]]:
    """Places of all lengths, longest first, in batches of like lengths.

    A batch holds at most `budget` tokens, padding and `reserved` more for each included, and at least one place.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    start = 0
    while start < len(order):
        count = max(1, budget // max(1, lengths[order[start]] + reserved))
        yield order[start : start + count]
        start += count


def pad(rows: Sequence[Sequence[int]], fill: int, *, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, both (rows, longest)."""
    longest = max(map(len, rows))
    gaps = [longest - len(row) for row in rows]
    ids = [[fill] * gap + list(row) if left else list(row) + [fill] * gap for row, gap in zip(rows, gaps, strict=True)]
    mask = [
        [0] * gap + [1] * len(row) if left else [1] * len(row) + [0] * gap for row, gap in zip(rows, gaps, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)
