"""A causal LLM of transformers that samples on this machine, likelihoods included."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from cappy.sampling.decoding import Continuation
from cappy.sampling.generators import OnDrawn
from cappy.sampling.local import LocalLLM, each_step, padded
from cappy.sampling.prompts import prompt_tokens, response_tokens
from cappy.sampling.strategies import Decoding


class Causal(LocalLLM):
    """Samples from a folder that `AutoModelForCausalLM` loads.

    The prompt (see `prompt_tokens`) is encoded once, and its keys and values serve all samples of all decodings; beams
    go through transformers' own search, which encodes it again for every beam.
    """

    AUTO_MODEL = AutoModelForCausalLM

    @property
    def context(self) -> int | None:
        """Tokens of a prompt and its response together; None where their number has no bound."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        return positions if isinstance(positions, int) and positions > 0 else None

    def _prompts(self, instructions: Sequence[str], room: int) -> list[list[int]]:
        longest = self.context - room if self.context else None
        return [self._prompt(text, longest) for text in instructions]

    def _prompt(self, instruction: str, longest: int | None) -> list[int]:
        ids, cut = prompt_tokens(self.tokenizer, instruction, ends=self.ends.tolist(), longest=longest)
        self._cut += cut
        return ids

    def _response(self, text: str) -> list[int]:
        return response_tokens(self.tokenizer, text, int(self.ends[0]))

    def _encode(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask, padded on the left."""
        ids, mask = padded(prompts, self.pad, left=True)
        return ids.to(self.device), mask.to(self.device)

    def _begin(self, encoded: torch.Tensor, mask: torch.Tensor, copies: int) -> tuple[Continuation, torch.Tensor]:
        rows = _Prefix(self.model, mask)
        return rows, rows.start(encoded, copies)

    def _beams(
        self,
        prompts: Sequence[Sequence[int]],
        encoded: torch.Tensor,
        mask: torch.Tensor,
        decoding: Decoding,
        told: OnDrawn,
    ) -> tuple[list[tuple[int, ...]], torch.Tensor]:
        config = self.generation_config(decoding)
        sequences = self.model.generate(
            encoded,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=each_step(decoding, len(prompts) * decoding.num_samples, told),
        )[:, encoded.shape[1] :]
        tokens = self._ended(sequences)
        return tokens, self._sums([prompt for prompt in prompts for _ in range(decoding.num_samples)], tokens)

    def _sums(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> torch.Tensor:
        both = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
        # Padding on the right: nothing before it sees it, and positions are as in a pass of the row alone.
        ids, mask = (tensor.to(self.device) for tensor in padded(both, self.pad))
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        chosen = logits.gather(-1, ids[:, 1:, None]).squeeze(-1) - logits.logsumexp(-1)
        counted = mask[:, 1:].bool()
        for row, prompt in enumerate(prompts):
            counted[row, : len(prompt) - 1] = False
        sums: torch.Tensor = (chosen.double() * counted).sum(1)
        return sums


class _Prefix:
    """Rows that go on after their prompts, whose keys and values are computed once and then copied for each row."""

    def __init__(self, model: Any, mask: torch.Tensor) -> None:
        self._model = model
        self._mask = mask
        self._cache: Any = None
        takes = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in takes
        self._last_alone = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def start(self, ids: torch.Tensor, copies: int) -> torch.Tensor:
        """Logits after the prompts (prompts, longest), each `copies` times: (prompts * copies, vocabulary)."""
        positions = (self._mask.cumsum(-1) - 1).clamp_(min=0)
        logits = self._forward(ids, positions)
        if copies > 1:
            self._cache.batch_repeat_interleave(copies)
            self._mask = self._mask.repeat_interleave(copies, 0)
        return logits.float().repeat_interleave(copies, 0)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = self._mask.sum(-1, keepdim=True)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], 1)
        return self._forward(tokens[:, None], positions)

    def keep(self, rows: torch.Tensor) -> None:
        self._cache.batch_select_indices(rows)
        self._mask = self._mask[rows]

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        output = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=True,
            **({"position_ids": positions} if self._takes_positions else {}),
            **self._last_alone,
        )
        self._cache = output.past_key_values
        logits: torch.Tensor = output.logits[:, -1]
        return logits
