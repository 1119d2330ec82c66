"""Every family of encoders: a score depends on neither packing, batch nor order, and is that of transformers."""

import random
from typing import Any

import pytest
import torch
from encoders import FAMILIES, PACKED, WORDS, family_config, word_tokenizer
from transformers import AutoModelForSequenceClassification

from cappy.scoring import Scorer
from cappy.scoring.config import ChosenPrecision, ScorerConfig
from cappy.scoring.encoding import EncodedPair
from cappy.scoring.model import collate
from cappy.scoring.packed import can_pack

CPU = torch.device("cpu")


def pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Pairs of 5 to 43 tokens."""
    rng = random.Random(seed)
    return [tuple(" ".join(rng.choices(WORDS, k=rng.randint(1, 20))) for _ in range(2)) for _ in range(count)]  # type: ignore[misc]


def make(family: str, precision: ChosenPrecision = "fp32", **changes: object) -> Scorer:
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(family_config(family, num_labels=1, **changes)).eval()
    for parameter in model.parameters():  # Biases and norms of a new model are 0 and 1, which would hide mistakes.
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0 if parameter.mean() > 0.5 else 0.0, 0.1)
    return Scorer(model, word_tokenizer(), ScorerConfig(head="mse", max_length=60), precision=precision)


def padded_logits(scorer: Scorer, batch: list[EncodedPair]) -> torch.Tensor:
    """Logits by transformers' own forward pass."""
    types = getattr(scorer.model.config, "type_vocab_size", 0) > 1
    inputs = collate(batch, pad=1, token_types=types, device=CPU)
    logits: torch.Tensor = scorer.model(**inputs).logits.squeeze(-1)
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_is_that_of_the_pair_alone_whatever_the_batch_and_the_order(family: str) -> None:
    scorer = make(family)
    assert can_pack(scorer.model) == (family in PACKED)
    for seed in range(3):
        batch = scorer.encoder.encode(pairs(13, seed))
        with torch.no_grad():
            alone = torch.cat([padded_logits(scorer, [pair]) for pair in batch]).tolist()
        assert max(alone) - min(alone) > 0.05
        assert scorer.infer_logits(batch).tolist() == pytest.approx(alone, abs=1e-4)
        assert scorer.infer_logits(batch[::-1]).tolist() == pytest.approx(alone[::-1], abs=1e-4)
        assert scorer.infer_logits(batch[:4]).tolist() == pytest.approx(alone[:4], abs=1e-4)


@pytest.mark.parametrize("family", PACKED)
def test_a_padding_token_inside_a_text_counts_as_transformers_counts_it(family: str) -> None:
    scorer = make(family)
    (usual,) = scorer.encoder.encode(pairs(1))
    ids = (*usual.ids[:3], 1, *usual.ids[4:])
    batch = [usual, EncodedPair(ids=ids, types=usual.types)]
    with torch.no_grad():
        expected = torch.cat([padded_logits(scorer, [pair]) for pair in batch]).tolist()
    assert scorer.infer_logits(batch).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", PACKED)
def test_gradients_without_padding_equal_transformers_own(family: str) -> None:
    scorer = make(family)
    batch = scorer.encoder.encode(pairs(9, 1))
    weights = torch.linspace(-1, 1, len(batch))
    parameters = list(scorer.model.parameters())
    result, expected = (
        torch.autograd.grad((logits * weights).sum(), parameters)
        for logits in (scorer.training_logits(batch), padded_logits(scorer, batch))
    )
    for ours, theirs in zip(result, expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("which", ["hidden", "attention"])
@pytest.mark.parametrize("family", ["mpnet", "modernbert"])
def test_dropout_without_padding_is_as_strong_as_transformers_own(family: str, which: str) -> None:
    """The spread of the logits under dropout; each kind of dropout alone."""
    names = {
        "mpnet": {"hidden": "hidden_dropout_prob", "attention": "attention_probs_dropout_prob"},
        "modernbert": {"hidden": "mlp_dropout", "attention": "attention_dropout"},
    }[family]
    changes: dict[str, Any] = dict.fromkeys(names.values(), 0.0) | {names[which]: 0.3}
    scorer = make(family, **changes)
    scorer.model.train()
    batch = scorer.encoder.encode(pairs(4, 2)) * 8
    with torch.no_grad():
        spreads = [
            torch.stack([compute() for _ in range(60)]).unflatten(1, (8, 4)).transpose(0, 1).flatten(0, 1).std(0).mean()
            for compute in (lambda: scorer.training_logits(batch), lambda: padded_logits(scorer, batch))
        ]
    assert float(spreads[1]) > 1e-3
    assert float(spreads[0]) == pytest.approx(float(spreads[1]), rel=0.15)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_stays_near_fp32_and_does_not_depend_on_the_batch(family: str) -> None:
    # Weights as small as those of trained models: with large ones a logit's rounding says nothing about packing.
    exact, low = (make(family, precision, initializer_range=0.1) for precision in ("fp32", "bf16"))
    batch = exact.encoder.encode(pairs(13))
    together = low.infer_logits(batch)
    alone = torch.cat([low.infer_logits([pair]) for pair in batch])
    assert together.dtype is torch.float32
    assert (together - alone).abs().max() < 5e-3
    assert 0 < (together - exact.infer_logits(batch)).abs().mean() < 0.03
