"""Causal LLMs that run on vLLM, through its documented offline interface (`LLM`, `SamplingParams`).

Not tested with vLLM itself, which needs CUDA: the tests check the calls against a fake that records them. The interface
is that of vLLM's source (`vllm/sampling_params.py`, `vllm/outputs.py`, 2026).
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NewType, Protocol

from cappy.errors import ConfigError, FolderError
from cappy.model_folder import ModelFolder
from cappy.records import Candidate
from cappy.sampling.drawing import draw_seed, end_tokens, prompt_tokens, response_tokens
from cappy.sampling.generators import LocalGenerator, OnCandidates, SampleRange, reject_beams, response_status
from cappy.sampling.strategies import Decoding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Parameters = NewType("_Parameters", object)
"""vLLM's `SamplingParams`."""


class _Logprob(Protocol):
    logprob: float


class _Response(Protocol):
    """vLLM's `CompletionOutput`."""

    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float


class _Answer(Protocol):
    """vLLM's `RequestOutput`."""

    outputs: Sequence[_Response]
    prompt_logprobs: Sequence[Mapping[int, _Logprob]]


class _Engine(Protocol):
    """vLLM's `LLM`."""

    def get_tokenizer(self) -> "PreTrainedTokenizerBase": ...

    def generate(
        self, prompts: Sequence[Mapping[str, list[int]]], parameters: Sequence[_Parameters], /, *, use_tqdm: bool
    ) -> Sequence[_Answer]: ...


class VLLM(LocalGenerator):
    """Samples from a folder that vLLM loads: safetensors only, no code from the folder, no beam search.

    Each instruction has its own seed, so its samples do not depend on the instructions around it; vLLM itself
    guarantees equal tokens for a seed only on the same hardware with the same batching. Instructions longer than the
    context are truncated and counted.
    """

    def __init__(self, name: str, folder: ModelFolder, revision: str = "") -> None:
        path, config = folder.path, folder.config()
        if config.is_encoder_decoder:
            raise ConfigError(f"{name}: vLLM does not run encoder-decoders; use the folder without vllm:")
        super().__init__(name, revision or folder.hash[:12])
        try:
            vllm = importlib.import_module("vllm")
        except ImportError as error:
            raise ConfigError(f"{name}: vLLM is not installed; pip install vllm where there is a GPU") from error
        self._parameters_class: Callable[..., _Parameters] = vllm.SamplingParams
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        try:
            # generation_config="vllm" ignores the folder's own sampling settings.
            self._llm: _Engine = vllm.LLM(
                model=str(path),
                load_format="safetensors",
                trust_remote_code=False,
                generation_config="vllm",
                logprobs_mode="raw_logprobs",
            )
        except (OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise FolderError(f"{path}: vLLM cannot load it ({reason[:120]})") from error
        self._tokenizer = self._llm.get_tokenizer()
        self._end_tokens = end_tokens(self._tokenizer, config, path)

    def check(self, decodings: Sequence[Decoding]) -> None:
        """Raises ConfigError for beam search."""
        reject_beams(self.name, decodings)

    def close(self) -> None:
        """Closes the store and frees the engine."""
        super().close()
        vars(self).pop("_llm", None)

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, int]]:
        """Log-probability sum and token count of each response, end token included."""
        responses = [response_tokens(self._tokenizer, response, self._end_tokens[0]) for _, response in pairs]
        reserved = max(map(len, responses), default=0) + 1
        texts = list(dict.fromkeys(instruction for instruction, _ in pairs))
        prompts = dict(zip(texts, self._prompts(texts, reserved), strict=True))
        parameters = self._parameters_class(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        rows = [(prompts[text], response) for (text, _), response in zip(pairs, responses, strict=True)]
        outputs = self._generate([([*prompt, *response], parameters) for prompt, response in rows])
        results = []
        for (prompt, response), output in zip(rows, outputs, strict=True):
            logprobs = output.prompt_logprobs[len(prompt) :]
            total = sum(token_logprobs[token].logprob for token, token_logprobs in zip(response, logprobs, strict=True))
            results.append((float(total), len(response)))
        return results

    def _prompts(self, instructions: Sequence[str], reserved: int) -> list[list[int]]:
        max_tokens = self.context - reserved if self.context else None
        prompts = []
        for instruction in instructions:
            ids, truncated = prompt_tokens(self._tokenizer, instruction, ends=self._end_tokens, max_tokens=max_tokens)
            self._num_truncated += truncated
            prompts.append(ids)
        return prompts

    def _draw(
        self,
        instructions: Sequence[str],
        prompts: Sequence[Sequence[int]],
        ranges: Sequence[SampleRange],
        *,
        seed: int,
        on_candidates: OnCandidates,
    ) -> Iterator[dict[int, list[list[Candidate]]]]:
        """Draws everything in one call; the engine does its own batching."""
        decodings = [samples.decoding for samples in ranges]
        requests = [
            (list(prompt), self._parameters(decoding, draw_seed(seed, text, decoding)))
            for text, prompt in zip(instructions, prompts, strict=True)
            for decoding in decodings
        ]
        outputs = iter(self._generate(requests))
        on_candidates(len(prompts) * sum(decoding.num_samples for decoding in decodings))
        yield {
            index: [
                [self._candidate(output, decoding, seed) for output in next(outputs).outputs] for decoding in decodings
            ]
            for index in range(len(prompts))
        }

    def _generate(self, requests: Sequence[tuple[list[int], _Parameters]]) -> Sequence[_Answer]:
        prompts = [{"prompt_token_ids": ids} for ids, _ in requests]
        return self._llm.generate(prompts, [parameters for _, parameters in requests], use_tqdm=False)

    def _parameters(self, decoding: Decoding, seed: int) -> _Parameters:
        return self._parameters_class(
            n=decoding.num_samples,
            temperature=decoding.temperature if decoding.do_sample else 0.0,
            top_p=decoding.top_p,
            top_k=decoding.top_k,
            min_p=decoding.min_p,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            repetition_penalty=1.0,
            seed=seed,
            stop_token_ids=self._end_tokens,
            max_tokens=decoding.max_new_tokens,
            min_tokens=decoding.min_new_tokens,
            logprobs=0,
            skip_special_tokens=True,
        )

    def _candidate(self, output: _Response, decoding: Decoding, seed: int) -> Candidate:
        text = output.text.strip()
        count = len(output.token_ids)
        return Candidate(
            response=text,
            generator=self.name,
            revision=self.revision,
            decoding=decoding.name,
            seed=seed,
            status=response_status(text, complete=getattr(output, "finish_reason", None) != "length"),
            logprob_sum=output.cumulative_logprob,
            logprob_mean=output.cumulative_logprob / max(count, 1),
            num_tokens=count,
        )
