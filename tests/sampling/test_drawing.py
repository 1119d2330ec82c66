"""Draws follow the filtered distribution of transformers, and belong to their row alone."""

from collections import Counter

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cappy.sampling.drawing import NUCLEUS_ATTEMPTS, draw_uniforms, next_tokens
from cappy.sampling.strategies import GREEDY, Decoding

DRAWS = 40_000
DECODINGS = [
    Decoding(name="sampling"),
    Decoding(name="t", temperature=0.6),
    Decoding(name="k", top_k=7),
    Decoding(name="p", top_p=0.8),
    Decoding(name="small p", top_p=0.1),
    Decoding(name="kp", top_k=20, top_p=0.7),
    Decoding(name="m", min_p=0.2),
    Decoding(name="pm", top_p=0.9, min_p=0.1),
    Decoding(name="tkpm", temperature=1.4, top_k=20, top_p=0.9, min_p=0.05),
    Decoding(name="more than there are", top_k=1000, top_p=0.7),
]


def theirs(logits: torch.Tensor, decoding: Decoding) -> torch.Tensor:
    """Probabilities after the library's own filters, in its order."""
    filters = LogitsProcessorList([TemperatureLogitsWarper(decoding.temperature)])
    if decoding.top_k:
        filters.append(TopKLogitsWarper(decoding.top_k))
    if decoding.top_p < 1:
        filters.append(TopPLogitsWarper(decoding.top_p))
    if decoding.min_p:
        filters.append(MinPLogitsWarper(decoding.min_p))
    return filters(torch.zeros(1, 1, dtype=torch.long), logits).softmax(-1)[0]


@pytest.mark.parametrize("decoding", DECODINGS, ids=lambda decoding: decoding.name)
def test_draws_follow_the_librarys_distribution(decoding: Decoding) -> None:
    torch.manual_seed(0)
    logits = 1.5 * torch.randn(1, 50)
    expected = theirs(logits.clone(), decoding)
    numbers = torch.rand(DRAWS, NUCLEUS_ATTEMPTS + 1, dtype=torch.float64)
    drawn = next_tokens(logits.expand(DRAWS, -1).clone(), decoding, numbers)
    shares = torch.bincount(drawn, minlength=50) / DRAWS
    assert not shares[expected == 0].any(), "a token outside the filters was drawn"
    assert (shares - expected).abs().max() < 4 * (0.25 / DRAWS) ** 0.5


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_tokens_that_can_be_drawn(number: float) -> None:
    logits = torch.tensor([[-torch.inf, 2.0, 1.0, -torch.inf]])
    for decoding in DECODINGS:
        numbers = torch.full((1, NUCLEUS_ATTEMPTS + 1), number, dtype=torch.float64)
        assert next_tokens(logits.clone(), decoding, numbers).item() in (1, 2)


def test_uniforms_belong_to_seed_instruction_decoding_and_number() -> None:
    decoding = Decoding(name="a", num_samples=3, max_new_tokens=5)
    numbers = draw_uniforms(1, "text", decoding)
    assert numbers.shape == (3, 5, NUCLEUS_ATTEMPTS + 1)
    assert torch.equal(numbers, draw_uniforms(1, "text", decoding))
    others = [draw_uniforms(2, "text", decoding), draw_uniforms(1, "texts", decoding)]
    others.append(draw_uniforms(1, "text", Decoding(name="b", num_samples=3, max_new_tokens=5)))
    rows = [row for block in [numbers, *others] for row in block.flatten(1)]
    assert max(Counter(tuple(row.tolist()) for row in rows).values()) == 1
    fewer = draw_uniforms(1, "text", Decoding(name="a", num_samples=2, max_new_tokens=5))
    assert torch.equal(fewer, numbers[:2]), "more samples must begin with the same ones"


def test_greedy_takes_the_best() -> None:
    assert next_tokens(torch.tensor([[1.0, 3.0, 2.0]]), GREEDY, torch.zeros(1, NUCLEUS_ATTEMPTS + 1)).tolist() == [1]
