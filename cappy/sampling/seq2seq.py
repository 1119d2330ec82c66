"""An encoder-decoder LLM of transformers that samples on this machine, likelihoods included."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.logging import disable_progress_bar

from cappy.errors import ConfigError, FolderError
from cappy.records import Candidate
from cappy.records.folder import sha256_of
from cappy.sampling.strategies import Decoding

BATCH_INSTRUCTIONS = 32
MAX_INSTRUCTION_TOKENS = 512


class Seq2Seq:
    """Samples from a folder that `AutoModelForSeq2SeqLM` loads; safetensors only."""

    def __init__(self, name: str, folder: str | Path, revision: str = "") -> None:
        path = Path(folder)
        if not (path / "config.json").is_file():
            raise FolderError(f"{path}: no config.json there; a local generator is a folder that transformers saved")
        if not AutoConfig.from_pretrained(path).is_encoder_decoder:
            remedy = "serve it and name it as openai:model@http://host/v1"
            raise ConfigError(f"{path}: is not an encoder-decoder; {remedy}")
        self.name = name
        self.revision = revision or _weights_hash(path)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        disable_progress_bar()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self.model: Any = AutoModelForSeq2SeqLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
        self.model.to(self.device).eval()
        self._start = self.model.config.decoder_start_token_id
        self._end = self.tokenizer.eos_token_id
        self._pad = self.tokenizer.pad_token_id
        # generate() fills whatever a call leaves open from the model's own configuration; an empty one leaks nothing.
        self.model.generation_config = GenerationConfig()

    def sample(self, instructions: Sequence[str], decoding: Decoding, *, seed: int) -> list[list[Candidate]]:
        """`decoding.num_samples` candidates per instruction, in order, with likelihoods."""
        torch.manual_seed(seed)
        candidates: list[list[Candidate]] = []
        for start in range(0, len(instructions), BATCH_INSTRUCTIONS):
            candidates += self._sample_batch(instructions[start : start + BATCH_INSTRUCTIONS], decoding, seed)
        return candidates

    @torch.inference_mode()
    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, int]]:
        """(sum of log-probabilities, number of tokens) of each given response, end token included."""
        found: list[tuple[float, int]] = []
        for start in range(0, len(pairs), BATCH_INSTRUCTIONS):
            batch = pairs[start : start + BATCH_INSTRUCTIONS]
            inputs = self._inputs([instruction for instruction, _ in batch])
            encoded = self.model.get_encoder()(**inputs).last_hidden_state
            responses = [response for _, response in batch]
            sequences = self.tokenizer(responses, padding=True, return_tensors="pt").input_ids.to(self.device)
            sums, counts = self._likelihoods(encoded, inputs["attention_mask"], sequences)
            found += zip(sums.tolist(), counts.tolist(), strict=True)
        return found

    def _inputs(self, instructions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Padded ids and mask (instructions, longest)."""
        inputs = self.tokenizer(
            list(instructions), padding=True, truncation=True, max_length=MAX_INSTRUCTION_TOKENS, return_tensors="pt"
        ).to(self.device)
        return {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}

    @torch.inference_mode()
    def _sample_batch(self, instructions: Sequence[str], decoding: Decoding, seed: int) -> list[list[Candidate]]:
        inputs = self._inputs(instructions)
        mask = inputs["attention_mask"]
        encoded = self.model.get_encoder()(**inputs).last_hidden_state
        sequences = self.model.generate(
            # A copy, because generate() expands the states in place for several samples.
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded.clone()),
            attention_mask=mask,
            generation_config=self._generation_config(decoding),
        )[:, 1:]
        sums, counts = self._likelihoods(
            encoded.repeat_interleave(decoding.num_samples, 0),
            mask.repeat_interleave(decoding.num_samples, 0),
            sequences,
        )
        texts = self.tokenizer.batch_decode(sequences, skip_special_tokens=True)
        made = [
            self._candidate(text.strip(), total, count, decoding, seed)
            for text, total, count in zip(texts, sums.tolist(), counts.tolist(), strict=True)
        ]
        return [made[i : i + decoding.num_samples] for i in range(0, len(made), decoding.num_samples)]

    def _generation_config(self, decoding: Decoding) -> GenerationConfig:
        knobs: dict[str, Any] = {"temperature": decoding.temperature, "top_k": decoding.top_k, "top_p": decoding.top_p}
        return GenerationConfig(
            do_sample=decoding.do_sample,
            num_beams=decoding.num_beams,
            num_return_sequences=decoding.num_samples,
            max_new_tokens=decoding.max_new_tokens,
            decoder_start_token_id=self._start,
            eos_token_id=self._end,
            pad_token_id=self._pad,
            **(knobs if decoding.do_sample else {}),
        )

    def _likelihoods(
        self, encoded: torch.Tensor, mask: torch.Tensor, sequences: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the log-probabilities of each sequence's tokens up to its end token, and the number of those tokens.

        (rows, source, hidden), (rows, source) and (rows, length) -> two tensors of (rows,).
        """
        ended = (sequences == self._end).cumsum(1)
        counted = (ended == 0) | ((ended == 1) & (sequences == self._end))
        decoder_inputs = torch.cat([sequences.new_full((len(sequences), 1), self._start), sequences[:, :-1]], 1)
        logits = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
            attention_mask=mask,
            decoder_input_ids=decoder_inputs,
            use_cache=False,
        ).logits.float()
        chosen = logits.log_softmax(-1).gather(-1, sequences.unsqueeze(-1)).squeeze(-1)
        return (chosen * counted).sum(1), counted.sum(1)

    def _candidate(self, text: str, total: float, count: int, decoding: Decoding, seed: int) -> Candidate:
        return Candidate(
            response=text,
            generator=self.name,
            revision=self.revision,
            decoding=decoding.name,
            seed=seed,
            status="ok" if text else "empty",
            logprob_sum=total,
            logprob_mean=total / max(count, 1),
            num_tokens=count,
        )


def _weights_hash(folder: Path) -> str:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise FolderError(f"{folder}: holds no *.safetensors; save the model with safe_serialization=True")
    return "-".join(sha256_of(path)[:12] for path in weights)
