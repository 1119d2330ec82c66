"""Token sampling and the prompts of causal LLMs.

The uniform random numbers of a row come from its seed, instruction, decoding and sample number, so its tokens do not
depend on the other rows of the batch. The filters and their order are those of transformers: temperature, top-k,
top-p, min-p. Chat templates are untrusted and are rendered by `cappy.rendering`.
"""

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from cappy.errors import ConfigError, FolderError, quote
from cappy.rendering import jobs
from cappy.rendering.child import encode
from cappy.rendering.jobs import Failure, RenderJob, TemplateSource
from cappy.sampling.generators import OnCandidates, ignore_progress
from cappy.sampling.strategies import Decoding

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


NUCLEUS_ATTEMPTS = 8
"""Draws per token before top-p sampling falls back to sorting the vocabulary."""


def draw_uniforms(seed: int, instruction: str, decoding: Decoding, first: int = 0) -> torch.Tensor:
    """Uniform numbers in [0, 1) for the samples from number `first` on; zeros if the decoding does not sample.

    The result is float64, (samples, tokens, NUCLEUS_ATTEMPTS + 1).
    """
    if not decoding.do_sample:
        return torch.zeros(decoding.num_samples, decoding.max_new_tokens, NUCLEUS_ATTEMPTS + 1, dtype=torch.float64)
    rows = []
    for index in range(first, first + decoding.num_samples):
        key = np.frombuffer(_seed_bytes(seed, instruction, decoding, index), dtype=np.uint64)
        rows.append(
            np.random.Generator(np.random.Philox(key=key)).random((decoding.max_new_tokens, NUCLEUS_ATTEMPTS + 1))
        )
    return torch.from_numpy(np.stack(rows))


def draw_seed(seed: int, instruction: str, decoding: Decoding) -> int:
    """A seed below 2**31 for engines that sample on their own."""
    return int.from_bytes(_seed_bytes(seed, instruction, decoding, 0)[:4], "little") & 0x7FFF_FFFF


def next_tokens(logits: torch.Tensor, decoding: Decoding, uniforms: torch.Tensor) -> torch.Tensor:
    """The next token of every row: (rows, vocabulary) float32 and (rows, NUCLEUS_ATTEMPTS + 1) -> (rows,)."""
    if not decoding.do_sample:
        return logits.argmax(-1)
    scaled = logits / decoding.temperature if decoding.temperature != 1 else logits
    if decoding.top_k and decoding.top_k < logits.shape[-1]:
        values, tokens = scaled.topk(decoding.top_k)
        chosen = _sample_sorted(values, decoding, uniforms[:, 0])
        return tokens.gather(1, chosen).squeeze(1)
    probabilities = (scaled - scaled.amax(-1, keepdim=True)).exp_()
    if decoding.top_p < 1:
        return _draw_from_nucleus(probabilities, decoding, uniforms)
    return _draw_index(_apply_min_p(probabilities, decoding.min_p), uniforms[:, :1]).squeeze(1)


def _draw_from_nucleus(weights: torch.Tensor, decoding: Decoding, uniforms: torch.Tensor) -> torch.Tensor:
    """Top-p sampling by rejection, exact and mostly without sorting: (rows, vocabulary) -> (rows,).

    A token is in the nucleus if the tokens that are more probable have less than `top_p` of the probability.
    """
    mass = weights.sum(-1, keepdim=True)
    result = torch.empty(len(weights), dtype=torch.long, device=weights.device)
    filtered = _apply_min_p(weights, decoding.min_p)
    cumulative = filtered.cumsum(-1, dtype=torch.float64)
    remaining = torch.arange(len(weights), device=weights.device)
    for attempt in range(NUCLEUS_ATTEMPTS):
        tokens = _invert_cumulative(cumulative[remaining], uniforms[remaining, attempt : attempt + 1])
        remaining_weights = weights[remaining]
        chosen = remaining_weights.gather(1, tokens)
        above = torch.where(remaining_weights > chosen, remaining_weights, 0).sum(-1, keepdim=True)
        inside = (above < decoding.top_p * mass[remaining]).squeeze(1)
        result[remaining[inside]] = tokens[inside].squeeze(1)
        remaining = remaining[~inside]
        if not len(remaining):
            return result
    values, tokens = weights[remaining].log().sort(-1, descending=True)
    result[remaining] = tokens.gather(
        1, _sample_sorted(values, decoding, uniforms[remaining, NUCLEUS_ATTEMPTS])
    ).squeeze(1)
    return result


def _sample_sorted(values: torch.Tensor, decoding: Decoding, uniforms: torch.Tensor) -> torch.Tensor:
    """Draws indices (rows, 1) from logits that are sorted in descending order."""
    weights = values.softmax(-1)
    filtered = _apply_min_p(weights, decoding.min_p)
    if decoding.top_p < 1:
        filtered = torch.where(weights.cumsum(-1) - weights < decoding.top_p, filtered, 0)
    return _draw_index(filtered, uniforms[:, None])


def _apply_min_p(weights: torch.Tensor, min_p: float) -> torch.Tensor:
    return torch.where(weights >= min_p * weights.amax(-1, keepdim=True), weights, 0) if min_p else weights


def _draw_index(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    return _invert_cumulative(weights.cumsum(-1, dtype=torch.float64), uniforms)


def _invert_cumulative(cumulative: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The first index whose cumulative weight exceeds `uniforms` times the total: (rows, 1)."""
    total = cumulative[:, -1:]
    targets = (uniforms.to(cumulative.dtype) * total).clamp(max=torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, targets, right=True).clamp_(max=cumulative.shape[1] - 1)


def _seed_bytes(seed: int, instruction: str, decoding: Decoding, index: int) -> bytes:
    text = repr((seed, instruction, decoding.name, index)).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).digest()


COMPACT_BELOW = 0.85
"""Active share of a batch below which finished rows are removed; not before, since each removal copies the cache."""


class Continuation(Protocol):
    """A batch of rows that a model continues token by token."""

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Appends a token to each row, (rows,), and returns the next logits (rows, vocabulary)."""

    def keep(self, rows: torch.Tensor) -> None:
        """Keeps only these rows."""


@dataclass(frozen=True, slots=True)
class Response:
    """Generated tokens, including the end token if there is one, and the sum of their log-probabilities."""

    tokens: tuple[int, ...]
    logprob_sum: float


def continue_rows(
    model: Continuation,
    logits: torch.Tensor,
    rows: Sequence[Decoding],
    uniforms: Sequence[torch.Tensor],
    ends: torch.Tensor,
    on_candidates: OnCandidates = ignore_progress,
) -> list[Response]:
    """Generates the responses of all rows; log-probabilities are the model's own, before temperature and filters.

    `logits` are the float32 logits of the first token (rows, vocabulary), `uniforms` has (tokens, NUCLEUS_ATTEMPTS + 1)
    numbers for each row, `ends` are the end tokens. `on_candidates` is called after each token.
    """
    state = _BatchState(rows, uniforms, logits.device)
    limit, num_active = max(decoding.max_new_tokens for decoding in rows), len(rows)
    for step in range(limit):
        chosen = state.choose(logits, step, ends)
        active = state.record(logits, chosen, step, ends)
        on_candidates(num_active - len(active), in_progress=len(active) * (step + 1) / limit)
        num_active = len(active)
        if not len(active):
            break
        if len(active) < COMPACT_BELOW * len(chosen):
            model.keep(active)
            state.keep(active)
            chosen = chosen[active]
        logits = model.step(chosen).float()
    return state.responses()


class _BatchState:
    """The tokens of every row so far, and the rows that are still in the batch."""

    def __init__(self, rows: Sequence[Decoding], uniforms: Sequence[torch.Tensor], device: torch.device) -> None:
        self._decodings = list(dict.fromkeys(rows))
        decoding_index = {decoding: index for index, decoding in enumerate(self._decodings)}
        max_length = max(decoding.max_new_tokens for decoding in rows)
        self._decoding_indices = torch.tensor([decoding_index[decoding] for decoding in rows], device=device)
        self._max_lengths = torch.tensor([decoding.max_new_tokens for decoding in rows], device=device)
        self._min_lengths = torch.tensor([decoding.min_new_tokens for decoding in rows], device=device)
        padded = [torch.nn.functional.pad(numbers, (0, 0, 0, max_length - len(numbers))) for numbers in uniforms]
        self._uniforms = torch.stack(padded).to(device)
        self._batch_rows = torch.arange(len(rows), device=device)
        self._tokens = torch.zeros(len(rows), max_length, dtype=torch.long, device=device)
        self._lengths = torch.zeros(len(rows), dtype=torch.long, device=device)
        self._sums = torch.zeros(len(rows), dtype=torch.float64, device=device)
        self._ended = torch.zeros(len(rows), dtype=torch.bool, device=device)

    def choose(self, logits: torch.Tensor, step: int, ends: torch.Tensor) -> torch.Tensor:
        """Chooses the next token of every row in the batch."""
        early = (step < self._min_lengths[self._batch_rows]).nonzero().squeeze(1)
        if len(early):
            logits = logits.clone()
            logits[early[:, None], ends] = -torch.inf
        decoding_indices = self._decoding_indices[self._batch_rows]
        chosen = torch.empty(len(logits), dtype=torch.long, device=logits.device)
        for index, decoding in enumerate(self._decodings):
            rows = (decoding_indices == index).nonzero().squeeze(1)
            if len(rows):
                row_logits = logits if len(rows) == len(logits) else logits[rows]
                chosen[rows] = next_tokens(row_logits, decoding, self._uniforms[self._batch_rows[rows], step])
        return chosen

    def record(self, logits: torch.Tensor, chosen: torch.Tensor, step: int, ends: torch.Tensor) -> torch.Tensor:
        """Records the tokens of unfinished rows; returns the batch indices of the rows that continue."""
        logprobs = logits.gather(1, chosen[:, None]).squeeze(1) - logits.logsumexp(-1)
        active = ~self._ended[self._batch_rows]
        rows = self._batch_rows[active]
        self._tokens[rows, step] = chosen[active]
        self._sums[rows] += logprobs[active].double()
        self._lengths[rows] = step + 1
        self._ended[rows] = torch.isin(chosen[active], ends) | (step + 1 >= self._max_lengths[rows])
        return (~self._ended[self._batch_rows]).nonzero().squeeze(1)

    def keep(self, rows: torch.Tensor) -> None:
        self._batch_rows = self._batch_rows[rows]

    def responses(self) -> list[Response]:
        columns = (self._tokens.tolist(), self._lengths.tolist(), self._sums.tolist())
        return [Response(tuple(tokens[:length]), total) for tokens, length, total in zip(*columns, strict=True)]


def prompt_tokens(
    tokenizer: "PreTrainedTokenizerBase", instruction: str, *, ends: Collection[int], max_tokens: int | None = None
) -> tuple[list[int], bool]:
    """The prompt's tokens, at most `max_tokens`, and whether the instruction was truncated to fit.

    The prompt is the tokenizer's chat template with the instruction as the user's turn, or the instruction alone if
    there is no template. The template itself is never truncated. Raises ConfigError if it leaves no room.
    """
    prompt = encode_prompt(tokenizer, instruction, ends)
    if max_tokens is None or len(prompt) <= max_tokens:
        return prompt, False
    instruction_ids: list[int] = tokenizer(instruction, add_special_tokens=False).input_ids
    while len(prompt) > max_tokens and instruction_ids:
        instruction_ids = instruction_ids[: max(0, len(instruction_ids) - (len(prompt) - max_tokens))]
        prompt = encode_prompt(tokenizer, tokenizer.decode(instruction_ids), ends)
    if not instruction_ids or len(prompt) > max_tokens:
        raise ConfigError(
            f"sampling: the LLM's context leaves {max(max_tokens, 0)} tokens for the instruction "
            f"{quote(instruction, 40)}, too few; lower --max-new-tokens (or max_new_tokens in the file of decodings), "
            "or choose another LLM"
        )
    return prompt, True


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", instruction: str, ends: Collection[int]) -> list[int]:
    """The tokens of the whole prompt."""
    if tokenizer.chat_template:
        text = chat_prompt(tokenizer, instruction)
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids
    ids = tokenizer(instruction).input_ids
    # Some tokenizers append an end token, after which the model would not continue.
    while ids and ids[-1] in ends:
        ids = ids[:-1]
    return ids or [next(iter(ends)) if tokenizer.bos_token_id is None else tokenizer.bos_token_id]


def response_tokens(tokenizer: "PreTrainedTokenizerBase", text: str, end: int) -> list[int]:
    """The tokens of a response text, followed by the end token."""
    return [*tokenizer(text, add_special_tokens=False).input_ids, end]


def end_tokens(tokenizer: "PreTrainedTokenizerBase", config: "PreTrainedConfig", folder: Path) -> list[int]:
    """The token ids that end a response, the tokenizer's own first. Raises ConfigError if there is none.

    They come from the tokenizer, config.json and generation_config.json, where some chat LLMs name the end of a turn.
    From generation_config.json only added tokens of the tokenizer are used; an ordinary token there is not trusted.
    """
    turn_ends = [end for end in _as_list(_generation_config_ends(folder)) if end in tokenizer.added_tokens_decoder]
    candidates = [tokenizer.eos_token_id, *_as_list(getattr(config, "eos_token_id", None)), *turn_ends]
    ends = list(dict.fromkeys(end for end in candidates if end is not None and end < config.vocab_size))
    if not ends:
        raise ConfigError(f"{folder}: neither the tokenizer nor config.json has an end token; set eos_token_id there")
    return ends


def _generation_config_ends(folder: Path) -> object:
    """`eos_token_id` of generation_config.json (checked when the folder was opened); None without one."""
    path = folder / "generation_config.json"
    values = json.loads(path.read_bytes()) if path.is_file() else None
    return values.get("eos_token_id") if isinstance(values, dict) else None


def _as_list(ends: object) -> list[int]:
    values = ends if isinstance(ends, list) else [ends]
    return [end for end in values if isinstance(end, int) and not isinstance(end, bool) and end >= 0]


MAX_CHARACTERS = 2**20
"""Maximum characters of a prompt, in addition to `_MAX_REPEATS` times the instruction, which a template may repeat."""
_MAX_REPEATS = 4


def chat_prompt(tokenizer: "PreTrainedTokenizerBase", instruction: str) -> str:
    """The result of `tokenizer.apply_chat_template` for the instruction as the user's turn, with generation prompt.

    Raises FolderError, which names the folder, if the template fails, takes too long or needs too much memory.
    """
    turns = [{"role": "user", "content": instruction}]
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # several templates, and none is the default
        raise _template_error(tokenizer, quote(str(error).partition(".")[0], limit=120)) from error
    values = json.dumps(encode({"messages": turns, "tokens": dict(tokenizer.special_tokens_map)}), ensure_ascii=False)
    job = RenderJob(values=values, items=((TemplateSource("chat", (template,)), None),))
    ((outcome,),) = jobs.run("chat", [job])
    if isinstance(outcome, Failure):
        raise _template_error(tokenizer, outcome.reason)
    if not isinstance(outcome, str):
        raise TypeError(f"expected a text from the child process, got {quote(outcome)}")
    if len(outcome) > MAX_CHARACTERS + len(instruction) * _MAX_REPEATS:
        reason = f"it expands an instruction of {len(instruction):,} characters to {len(outcome):,}"
        raise _template_error(tokenizer, reason)
    return outcome


def _template_error(tokenizer: "PreTrainedTokenizerBase", reason: str) -> FolderError:
    remedy = "fix the template in the folder, or choose another LLM"
    return FolderError(f"{tokenizer.name_or_path}: the chat template cannot be used ({reason}); {remedy}")
