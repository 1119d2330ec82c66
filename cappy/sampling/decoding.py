"""The loop that continues many rows token by token, whatever model stands behind; rows that ended leave the batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from cappy.sampling.drawing import next_tokens
from cappy.sampling.generators import OnDrawn, unheard
from cappy.sampling.strategies import Decoding

DROPPED_AT = 0.85
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
    told: OnDrawn = unheard,
) -> list[Response]:
    """The responses of all rows; likelihoods are the model's own, before temperature and filters.

    `logits` (rows, vocabulary) float32 of the first token; `numbers` (tokens, TRIES + 1) of each row; `ends` the end
    tokens. `told` hears after each token how many more responses are complete.
    """
    state = _Rows(rows, numbers, logits.device)
    limit, left = max(decoding.max_new_tokens for decoding in rows), len(rows)
    for step in range(limit):
        chosen = state.choose(logits, step, ends)
        going = state.record(logits, chosen, step, ends)
        told(left - len(going), begun=len(going) * (step + 1) / limit)
        left = len(going)
        if not len(going):
            break
        if len(going) < DROPPED_AT * len(chosen):
            model.keep(going)
            state.keep(going)
            chosen = chosen[going]
        logits = model.step(chosen).float()
    return state.responses()


class _Rows:
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
        told = logits.gather(1, chosen[:, None]).squeeze(1) - logits.logsumexp(-1)
        going = ~self._ended[self._standing]
        rows = self._standing[going]
        self._tokens[rows, step] = chosen[going]
        self._sums[rows] += told[going].double()
        self._lengths[rows] = step + 1
        self._ended[rows] = torch.isin(chosen[going], ends) | (step + 1 >= self._limits[rows])
        return (~self._ended[self._standing]).nonzero().squeeze(1)

    def keep(self, rows: torch.Tensor) -> None:
        self._standing = self._standing[rows]

    def responses(self) -> list[Response]:
        columns: Any = zip(self._tokens.tolist(), self._lengths.tolist(), self._sums.tolist(), strict=True)
        return [Response(tuple(tokens[:length]), total) for tokens, length, total in columns]
