"""How responses are drawn token by token: one draw per row, from uniforms that belong to the row alone.

Because a row's uniforms come from its seed, instruction, decoding and number, what it draws does not depend on which
rows happen to share its batch. The filters are those of transformers in their order: temperature, top-k, top-p, min-p.

Before that: what a causal LLM is shown for an instruction, its chat template, which is untrusted, and how much of it
fits.
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
from cappy.rendering.jobs import Failure, Job, Source
from cappy.sampling.generators import OnCandidates, ignore_progress
from cappy.sampling.strategies import Decoding

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


NUCLEUS_ATTEMPTS = 8
"""How often a token outside the top-p nucleus is drawn again before the vocabulary is sorted after all."""


def draw_uniforms(seed: int, instruction: str, decoding: Decoding, first: int = 0) -> torch.Tensor:
    """Numbers in [0, 1) for every sample and step: (samples, tokens, NUCLEUS_ATTEMPTS + 1), float64; zeros where none are drawn.

    The samples are those from number `first` on.
    """
    if not decoding.do_sample:
        return torch.zeros(decoding.num_samples, decoding.max_new_tokens, NUCLEUS_ATTEMPTS + 1, dtype=torch.float64)
    rows = []
    for number in range(first, first + decoding.num_samples):
        words = np.frombuffer(_seed_bytes(seed, instruction, decoding, number), dtype=np.uint64)
        rows.append(
            np.random.Generator(np.random.Philox(key=words)).random((decoding.max_new_tokens, NUCLEUS_ATTEMPTS + 1))
        )
    return torch.from_numpy(np.stack(rows))


def draw_seed(seed: int, instruction: str, decoding: Decoding) -> int:
    """A seed below 2**31 for engines that draw by themselves."""
    return int.from_bytes(_seed_bytes(seed, instruction, decoding, 0)[:4], "little") & 0x7FFF_FFFF


def next_tokens(logits: torch.Tensor, decoding: Decoding, numbers: torch.Tensor) -> torch.Tensor:
    """The next token of every row: (rows, vocabulary) float32 and (rows, NUCLEUS_ATTEMPTS + 1) -> (rows,)."""
    if not decoding.do_sample:
        return logits.argmax(-1)
    scaled = logits / decoding.temperature if decoding.temperature != 1 else logits
    if decoding.top_k and decoding.top_k < logits.shape[-1]:
        values, tokens = scaled.topk(decoding.top_k)
        chosen = _sample_sorted(values, decoding, numbers[:, 0])
        return tokens.gather(1, chosen).squeeze(1)
    probabilities = (scaled - scaled.amax(-1, keepdim=True)).exp_()
    if decoding.top_p < 1:
        return _draw_from_nucleus(probabilities, decoding, numbers)
    return _draw_index(_apply_min_p(probabilities, decoding.min_p), numbers[:, :1]).squeeze(1)


def _draw_from_nucleus(weights: torch.Tensor, decoding: Decoding, numbers: torch.Tensor) -> torch.Tensor:
    """Draws from everything and again where that fell outside: exact, and rarely needs the vocabulary sorted.

    A token is inside when the tokens that are more probable than it hold less than `top_p` together.
    """
    mass = weights.sum(-1, keepdim=True)
    drawn = torch.empty(len(weights), dtype=torch.long, device=weights.device)
    floored = _apply_min_p(weights, decoding.min_p)
    cumulative = floored.cumsum(-1, dtype=torch.float64)
    left = torch.arange(len(weights), device=weights.device)
    for attempt in range(NUCLEUS_ATTEMPTS):
        tokens = _invert_cumulative(cumulative[left], numbers[left, attempt : attempt + 1])
        own = weights[left]
        chosen = own.gather(1, tokens)
        above = torch.where(own > chosen, own, 0).sum(-1, keepdim=True)
        inside = (above < decoding.top_p * mass[left]).squeeze(1)
        drawn[left[inside]] = tokens[inside].squeeze(1)
        left = left[~inside]
        if not len(left):
            return drawn
    values, tokens = weights[left].log().sort(-1, descending=True)
    drawn[left] = tokens.gather(1, _sample_sorted(values, decoding, numbers[left, NUCLEUS_ATTEMPTS])).squeeze(1)
    return drawn


def _sample_sorted(values: torch.Tensor, decoding: Decoding, numbers: torch.Tensor) -> torch.Tensor:
    """Positions (rows, 1) drawn from logits that fall along the row."""
    weights = values.softmax(-1)
    kept = _apply_min_p(weights, decoding.min_p)
    if decoding.top_p < 1:
        kept = torch.where(weights.cumsum(-1) - weights < decoding.top_p, kept, 0)
    return _draw_index(kept, numbers[:, None])


def _apply_min_p(weights: torch.Tensor, min_p: float) -> torch.Tensor:
    return torch.where(weights >= min_p * weights.amax(-1, keepdim=True), weights, 0) if min_p else weights


def _draw_index(weights: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    return _invert_cumulative(weights.cumsum(-1, dtype=torch.float64), numbers)


def _invert_cumulative(cumulative: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The first position whose cumulative weight is above the number's share of the whole: (rows, 1)."""
    total = cumulative[:, -1:]
    wanted = (numbers.to(cumulative.dtype) * total).clamp(max=torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, wanted, right=True).clamp_(max=cumulative.shape[1] - 1)


def _seed_bytes(seed: int, instruction: str, decoding: Decoding, number: int) -> bytes:
    text = repr((seed, instruction, decoding.name, number)).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).digest()


COMPACT_BELOW = 0.85
"""Ended rows are dropped once fewer than this part of the batch goes on, since dropping copies the cache."""


class Continuation(Protocol):
    """Rows that a model continues: tokens in, logits of the token after out."""

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """The logits (rows, vocabulary) after one more token per row (rows,)."""

    def keep(self, rows: torch.Tensor) -> None:
        """Goes on with these rows alone."""


@dataclass(frozen=True, slots=True)
class Response:
    """Tokens that a model gave, its end token included if it came, and the sum of their log-probabilities."""

    tokens: tuple[int, ...]
    logprob_sum: float


def continue_rows(
    model: Continuation,
    logits: torch.Tensor,
    rows: Sequence[Decoding],
    numbers: Sequence[torch.Tensor],
    ends: torch.Tensor,
    on_candidates: OnCandidates = ignore_progress,
) -> list[Response]:
    """The responses of all rows; likelihoods are the model's own, before temperature and filters.

    `logits` (rows, vocabulary) float32 of the first token; `numbers` (tokens, NUCLEUS_ATTEMPTS + 1) of each row; `ends` the end
    tokens. `on_candidates` hears after each token how many more responses are complete.
    """
    state = _BatchState(rows, numbers, logits.device)
    limit, left = max(decoding.max_new_tokens for decoding in rows), len(rows)
    for step in range(limit):
        chosen = state.choose(logits, step, ends)
        going = state.record(logits, chosen, step, ends)
        on_candidates(left - len(going), in_progress=len(going) * (step + 1) / limit)
        left = len(going)
        if not len(going):
            break
        if len(going) < COMPACT_BELOW * len(chosen):
            model.keep(going)
            state.keep(going)
            chosen = chosen[going]
        logits = model.step(chosen).float()
    return state.responses()


class _BatchState:
    """What each row has so far, and which rows stand in the batch."""

    def __init__(self, rows: Sequence[Decoding], numbers: Sequence[torch.Tensor], device: torch.device) -> None:
        self._decodings = list(dict.fromkeys(rows))
        place = {decoding: number for number, decoding in enumerate(self._decodings)}
        most = max(decoding.max_new_tokens for decoding in rows)
        self._kinds = torch.tensor([place[decoding] for decoding in rows], device=device)
        self._limits = torch.tensor([decoding.max_new_tokens for decoding in rows], device=device)
        self._least = torch.tensor([decoding.min_new_tokens for decoding in rows], device=device)
        padded = [torch.nn.functional.pad(own, (0, 0, 0, most - len(own))) for own in numbers]
        self._numbers = torch.stack(padded).to(device)
        self._standing = torch.arange(len(rows), device=device)
        self._tokens = torch.zeros(len(rows), most, dtype=torch.long, device=device)
        self._lengths = torch.zeros(len(rows), dtype=torch.long, device=device)
        self._sums = torch.zeros(len(rows), dtype=torch.float64, device=device)
        self._ended = torch.zeros(len(rows), dtype=torch.bool, device=device)

    def choose(self, logits: torch.Tensor, step: int, ends: torch.Tensor) -> torch.Tensor:
        """The next token of every standing row."""
        early = (step < self._least[self._standing]).nonzero().squeeze(1)
        if len(early):
            logits = logits.clone()
            logits[early[:, None], ends] = -torch.inf
        kinds = self._kinds[self._standing]
        chosen = torch.empty(len(logits), dtype=torch.long, device=logits.device)
        for number, decoding in enumerate(self._decodings):
            own = (kinds == number).nonzero().squeeze(1)
            if len(own):
                part = logits if len(own) == len(logits) else logits[own]
                chosen[own] = next_tokens(part, decoding, self._numbers[self._standing[own], step])
        return chosen

    def record(self, logits: torch.Tensor, chosen: torch.Tensor, step: int, ends: torch.Tensor) -> torch.Tensor:
        """Notes the tokens of the rows that have not ended; places in the batch of those that go on after it."""
        likelihoods = logits.gather(1, chosen[:, None]).squeeze(1) - logits.logsumexp(-1)
        going = ~self._ended[self._standing]
        rows = self._standing[going]
        self._tokens[rows, step] = chosen[going]
        self._sums[rows] += likelihoods[going].double()
        self._lengths[rows] = step + 1
        self._ended[rows] = torch.isin(chosen[going], ends) | (step + 1 >= self._limits[rows])
        return (~self._ended[self._standing]).nonzero().squeeze(1)

    def keep(self, rows: torch.Tensor) -> None:
        self._standing = self._standing[rows]

    def responses(self) -> list[Response]:
        columns = (self._tokens.tolist(), self._lengths.tolist(), self._sums.tolist())
        return [Response(tuple(tokens[:length]), total) for tokens, length, total in zip(*columns, strict=True)]


def prompt_tokens(
    tokenizer: "PreTrainedTokenizerBase", instruction: str, *, ends: Collection[int], longest: int | None = None
) -> tuple[list[int], bool]:
    """The prompt's tokens, at most `longest`, and whether the instruction lost its end for that.

    The prompt is the tokenizer's chat template with the instruction as the user's turn, or the instruction alone where
    there is no template. The template itself is never cut; ConfigError if there is no room for anything else.
    """
    prompt = encode_prompt(tokenizer, instruction, ends)
    if longest is None or len(prompt) <= longest:
        return prompt, False
    own: list[int] = tokenizer(instruction, add_special_tokens=False).input_ids
    while len(prompt) > longest and own:
        own = own[: max(0, len(own) - (len(prompt) - longest))]
        prompt = encode_prompt(tokenizer, tokenizer.decode(own), ends)
    if not own or len(prompt) > longest:
        raise ConfigError(
            f"sampling: the LLM's context leaves {max(longest, 0)} tokens for the instruction "
            f"{quote(instruction, 40)}, too few; lower --max-new-tokens (or max_new_tokens in the file of decodings), "
            "or take another LLM"
        )
    return prompt, True


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", instruction: str, ends: Collection[int]) -> list[int]:
    """The tokens of the whole prompt."""
    if tokenizer.chat_template:
        text = chat_prompt(tokenizer, instruction)
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids
    ids = tokenizer(instruction).input_ids
    # Some tokenizers close every text; after an end token there would be nothing to say.
    while ids and ids[-1] in ends:
        ids = ids[:-1]
    return ids or [next(iter(ends)) if tokenizer.bos_token_id is None else tokenizer.bos_token_id]


def response_tokens(tokenizer: "PreTrainedTokenizerBase", text: str, end: int) -> list[int]:
    """The tokens of a given response and the end token after it."""
    return [*tokenizer(text, add_special_tokens=False).input_ids, end]


def end_tokens(tokenizer: "PreTrainedTokenizerBase", config: "PreTrainedConfig", folder: Path) -> list[int]:
    """The tokens that end a response, the tokenizer's own first; ConfigError if none is named.

    Beside it those of config.json and, where the tokenizer has them as added tokens, of generation_config.json: some
    chat LLMs name the end of their turn there alone. A word of the vocabulary is a setting of the folder, not an end.
    """
    turns = [end for end in _as_list(_generation_config_ends(folder)) if end in tokenizer.added_tokens_decoder]
    known = [tokenizer.eos_token_id, *_as_list(getattr(config, "eos_token_id", None)), *turns]
    ends = list(dict.fromkeys(end for end in known if end is not None and end < config.vocab_size))
    if not ends:
        raise ConfigError(f"{folder}: neither tokenizer nor config.json names an end token; set eos_token_id there")
    return ends


def _generation_config_ends(folder: Path) -> object:
    """`eos_token_id` of the folder's generation_config.json, checked when the folder was opened; None without one."""
    path = folder / "generation_config.json"
    values = json.loads(path.read_bytes()) if path.is_file() else None
    return values.get("eos_token_id") if isinstance(values, dict) else None


def _as_list(ends: object) -> list[int]:
    listed = ends if isinstance(ends, list) else [ends]
    return [end for end in listed if isinstance(end, int) and not isinstance(end, bool) and end >= 0]


MAX_CHARACTERS = 2**20
"""Of a prompt, beyond the instruction, which the template may repeat `_MAX_REPEATED` times."""
_MAX_REPEATED = 4


def chat_prompt(tokenizer: "PreTrainedTokenizerBase", instruction: str) -> str:
    """What `tokenizer.apply_chat_template` makes of the instruction as the user's turn, up to where the LLM begins.

    FolderError names the tokenizer's folder where the template fails, takes too long or too much memory.
    """
    turns = [{"role": "user", "content": instruction}]
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # several templates, and none is the default
        raise _template_error(tokenizer, quote(str(error).partition(".")[0], limit=120)) from error
    values = json.dumps(encode({"messages": turns, "tokens": dict(tokenizer.special_tokens_map)}), ensure_ascii=False)
    job = Job(values=values, items=((Source("chat", (template,)), None),))
    ((outcome,),) = jobs.run("chat", [job])
    if isinstance(outcome, Failure):
        raise _template_error(tokenizer, outcome.reason)
    if not isinstance(outcome, str):
        raise TypeError(f"the child answers {quote(outcome)}")
    if len(outcome) > MAX_CHARACTERS + len(instruction) * _MAX_REPEATED:
        raise _template_error(tokenizer, f"makes {len(outcome):,} characters of {len(instruction):,}")
    return outcome


def _template_error(tokenizer: "PreTrainedTokenizerBase", reason: str) -> FolderError:
    remedy = "mend the template in the folder, or take another LLM"
    return FolderError(f"{tokenizer.name_or_path}: its chat template cannot be used ({reason}); {remedy}")
