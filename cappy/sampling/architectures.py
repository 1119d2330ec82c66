"""Causal and encoder-decoder LLMs of transformers as generators."""

import inspect
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.modeling_outputs import BaseModelOutput

from cappy.errors import ConfigError
from cappy.model_folder import ModelFolder
from cappy.sampling.drawing import Continuation, prompt_tokens, response_tokens
from cappy.sampling.generators import OnCandidates
from cappy.sampling.local import KeyValueCache, LanguageModel, LocalLLM, pad, progress_criteria
from cappy.sampling.strategies import Decoding


class Causal(LocalLLM):
    """Samples from a folder that `AutoModelForCausalLM` loads.

    The prompt (see `prompt_tokens`) is encoded once, and its key-value cache is shared by all samples of all decodings.
    Beam search uses transformers' `generate`, which encodes the prompt again for every beam.
    """

    AUTO_MODEL = AutoModelForCausalLM

    @property
    def context(self) -> int | None:
        """Maximum tokens of prompt and response together; None if the model has no limit."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        return positions if isinstance(positions, int) and positions > 0 else None

    def _prompts(self, instructions: Sequence[str], reserved: int) -> list[list[int]]:
        max_tokens = self.context - reserved if self.context else None
        return [self._prompt(text, max_tokens) for text in instructions]

    def _prompt(self, instruction: str, max_tokens: int | None) -> list[int]:
        ids, truncated = prompt_tokens(self.tokenizer, instruction, ends=self.end_ids.tolist(), max_tokens=max_tokens)
        self._num_truncated += truncated
        return ids

    def _tokenize_response(self, text: str) -> list[int]:
        return response_tokens(self.tokenizer, text, int(self.end_ids[0]))

    def _encode(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask, padded on the left."""
        ids, mask = pad(prompts, self.pad_id, left=True)
        return ids.to(self.device), mask.to(self.device)

    def _start_rows(self, encoded: torch.Tensor, mask: torch.Tensor, copies: int) -> tuple[Continuation, torch.Tensor]:
        rows = _CausalContinuation(self.model, mask)
        return rows, rows.start(encoded, copies)

    def _beam_search(
        self,
        prompts: Sequence[Sequence[int]],
        encoded: torch.Tensor,
        mask: torch.Tensor,
        decoding: Decoding,
        on_candidates: OnCandidates,
    ) -> tuple[list[tuple[int, ...]], torch.Tensor]:
        config = self.generation_config(decoding)
        sequences = self.model.generate(
            encoded,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=progress_criteria(decoding, len(prompts) * decoding.num_samples, on_candidates),
        )[:, encoded.shape[1] :]
        tokens = self._truncate_at_end(sequences)
        return tokens, self._logprob_sums([prompt for prompt in prompts for _ in range(decoding.num_samples)], tokens)

    def _logprob_sums(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> torch.Tensor:
        both = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
        # Right padding does not change a causal model's outputs at earlier positions.
        ids, mask = (tensor.to(self.device) for tensor in pad(both, self.pad_id))
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        chosen = logits.gather(-1, ids[:, 1:, None]).squeeze(-1) - logits.logsumexp(-1)
        response_mask = mask[:, 1:].bool()
        for row, prompt in enumerate(prompts):
            response_mask[row, : len(prompt) - 1] = False
        sums: torch.Tensor = (chosen.double() * response_mask).sum(1)
        return sums


class _CausalContinuation:
    """The `Continuation` of a causal LLM: encodes each prompt once and copies its key-value cache for each row."""

    def __init__(self, model: LanguageModel, mask: torch.Tensor) -> None:
        self._model = model
        self._mask = mask
        self._cache: KeyValueCache
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._last_logits_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    def start(self, ids: torch.Tensor, copies: int) -> torch.Tensor:
        """First token's logits, for `copies` rows per prompt: (prompts, longest) -> (prompts * copies, vocabulary)."""
        positions = (self._mask.cumsum(-1) - 1).clamp_(min=0)
        logits = self._forward(ids, positions, None)
        if copies > 1:
            self._cache.batch_repeat_interleave(copies)
            self._mask = self._mask.repeat_interleave(copies, 0)
        return logits.float().repeat_interleave(copies, 0)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = self._mask.sum(-1, keepdim=True)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], 1)
        return self._forward(tokens[:, None], positions, self._cache)

    def keep(self, rows: torch.Tensor) -> None:
        self._cache.batch_select_indices(rows)
        self._mask = self._mask[rows]

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, cache: KeyValueCache | None) -> torch.Tensor:
        output = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            past_key_values=cache,
            use_cache=True,
            **({"position_ids": positions} if self._takes_positions else {}),
            **self._last_logits_only,
        )
        self._cache = output.past_key_values
        return output.logits[:, -1]


MAX_INSTRUCTION_TOKENS = 512


class Seq2Seq(LocalLLM):
    """Samples from a folder that `AutoModelForSeq2SeqLM` loads.

    Each instruction is encoded once for all decodings. Greedy decoding and sampling share one loop over all rows; beam
    search uses transformers' `generate`.
    """

    AUTO_MODEL = AutoModelForSeq2SeqLM

    def __init__(self, name: str, folder: ModelFolder, revision: str = "") -> None:
        super().__init__(name, folder, revision)
        if getattr(self.model.config, "decoder_start_token_id", None) is None:
            raise ConfigError(
                f"{folder.path}: config.json has no decoder_start_token_id, which starts responses; set it there"
            )

    def _prompts(self, instructions: Sequence[str], reserved: int) -> list[list[int]]:
        context = getattr(self.model.config, "max_position_embeddings", None) or MAX_INSTRUCTION_TOKENS
        longest = min(MAX_INSTRUCTION_TOKENS, context)
        if not instructions:
            return []
        whole: list[list[int]] = self.tokenizer(list(instructions)).input_ids
        prompts = whole
        if any(len(prompt) > longest for prompt in whole):
            prompts = self.tokenizer(list(instructions), truncation=True, max_length=longest).input_ids
        self._num_truncated += sum(len(prompt) > longest for prompt in whole)
        return prompts

    def _tokenize_response(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text_target=text).input_ids
        return ids

    def _encode(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """States (rows, longest, hidden) and mask (rows, longest)."""
        ids, mask = (tensor.to(self.device) for tensor in pad(prompts, self.pad_id))
        return self.model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state, mask

    def _start_rows(self, encoded: torch.Tensor, mask: torch.Tensor, copies: int) -> tuple[Continuation, torch.Tensor]:
        rows = _Seq2SeqContinuation(self.model, encoded, mask)
        return rows, rows.start(copies)

    def _beam_search(
        self,
        prompts: Sequence[Sequence[int]],
        encoded: torch.Tensor,
        mask: torch.Tensor,
        decoding: Decoding,
        on_candidates: OnCandidates,
    ) -> tuple[list[tuple[int, ...]], torch.Tensor]:
        sequences = self.model.generate(
            # A copy, because generate() expands the states in place for several beams.
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded.clone()),
            attention_mask=mask,
            generation_config=self.generation_config(decoding),
            stopping_criteria=progress_criteria(decoding, len(prompts) * decoding.num_samples, on_candidates),
        )[:, 1:]
        tokens = self._truncate_at_end(sequences)
        num_samples = decoding.num_samples
        return tokens, self._target_sums(
            encoded.repeat_interleave(num_samples, 0), mask.repeat_interleave(num_samples, 0), tokens
        )

    def _logprob_sums(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> torch.Tensor:
        distinct_prompts = list(dict.fromkeys(map(tuple, prompts)))
        states, mask = self._encode(distinct_prompts)
        index = {prompt: i for i, prompt in enumerate(distinct_prompts)}
        rows = torch.tensor([index[tuple(prompt)] for prompt in prompts], device=self.device)
        return self._target_sums(states[rows], mask[rows], responses)

    def _target_sums(
        self, states: torch.Tensor, mask: torch.Tensor, responses: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """Log-probability sum of each response: states (rows, source, hidden), mask (rows, source) -> (rows,)."""
        targets, response_mask = (tensor.to(self.device) for tensor in pad(responses, self.pad_id))
        start = targets.new_full((len(targets), 1), self.model.config.decoder_start_token_id)
        logits = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=mask,
            decoder_input_ids=torch.cat([start, targets[:, :-1]], 1),
            use_cache=False,
        ).logits.float()
        chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
        sums: torch.Tensor = (chosen.double() * response_mask).sum(1)
        return sums


class _Seq2SeqContinuation:
    """The `Continuation` of an encoder-decoder: computes the cross-attention's keys and values once per instruction."""

    def __init__(self, model: LanguageModel, states: torch.Tensor, mask: torch.Tensor) -> None:
        self._model = model
        self._states = states
        self._mask = mask
        self._cache: KeyValueCache

    def start(self, copies: int) -> torch.Tensor:
        """First token's logits, for `copies` rows per instruction: (instructions * copies, vocabulary)."""
        start_id = self._model.config.decoder_start_token_id
        logits = self._forward(torch.full((len(self._mask),), start_id, device=self._mask.device), None)
        if copies > 1:
            self._cache.batch_repeat_interleave(copies)
            self._mask = self._mask.repeat_interleave(copies, 0)
        return logits.float().repeat_interleave(copies, 0)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._forward(tokens, self._cache)

    def keep(self, rows: torch.Tensor) -> None:
        self._cache.batch_select_indices(rows)
        self._mask = self._mask[rows]

    def _forward(self, tokens: torch.Tensor, cache: KeyValueCache | None) -> torch.Tensor:
        # Once the cache holds the cross-attention's keys and values, only the shape of the states matters.
        states = self._states if cache is None else self._states[:1].expand(len(tokens), -1, -1)
        output = self._model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=self._mask,
            decoder_input_ids=tokens[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        self._cache = output.past_key_values
        return output.logits[:, -1]
