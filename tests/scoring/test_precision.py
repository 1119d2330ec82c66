"""Without padding, in any company, in threads and in bf16: the numbers of plain transformers."""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from cappy.errors import ConfigError
from cappy.scoring import Scorer
from cappy.scoring.config import ChosenPrecision, ScorerConfig
from cappy.scoring.encoding import EncodedPair
from cappy.scoring.model import choose_precision, collate, has_bf16, has_prepacking

CPU = torch.device("cpu")
WORDS = "the a cat dog bird sat ran flew on in mat tree blue red one two three".split()


def pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    return [tuple(" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(2)) for _ in range(count)]  # type: ignore[misc]


def bert(*, precision: ChosenPrecision = "fp32", **settings: Any) -> Scorer:
    """A random BERT, which has token types and a pooler, unlike the RoBERTa of the other tests."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(
        vocab_size=21,
        max_position_embeddings=64,
        num_labels=1,
        pad_token_id=2,
        initializer_range=0.5,
        **sizes,
        **settings,
    )
    model = BertForSequenceClassification(config).eval()
    return Scorer(model, word_tokenizer(), ScorerConfig(head="mse", max_length=64), precision=precision)


def distilled(**options: Any) -> Scorer:
    """A random DistilBERT: a build that the packed forward does not know."""
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=21, dim=32, n_layers=2, n_heads=4, hidden_dim=64, num_labels=1, pad_token_id=2, initializer_range=0.3
    )
    model = DistilBertForSequenceClassification(config).eval()
    return Scorer(model, word_tokenizer(), ScorerConfig(head="bce", max_length=64), **options)


def word_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers.processors import TemplateProcessing

    vocabulary = {word: number for number, word in enumerate(["[UNK]", "[CLS]", "[PAD]", "[SEP]", *WORDS])}
    vocabulary["b"] = len(vocabulary)
    if len(vocabulary) > 21:
        vocabulary = {word: number for number, word in enumerate(list(vocabulary)[:21])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def own_logits(scorer: Scorer, batch: list[EncodedPair]) -> torch.Tensor:
    """Logits by transformers' own forward, padded."""
    types = getattr(scorer.model.config, "type_vocab_size", 0) > 1
    inputs = collate(batch, pad=scorer.tokenizer.pad_token_id, token_types=types, device=CPU)
    logits: torch.Tensor = scorer.model(**inputs).logits.squeeze(-1)
    return logits


def padded(scorer: Scorer, batch: list[EncodedPair]) -> list[float]:
    with torch.no_grad():
        logits: list[float] = own_logits(scorer, batch).tolist()
    return logits


@pytest.fixture(scope="module")
def roberta(scorer_folder: Path) -> Scorer:
    return Scorer.load(str(scorer_folder), precision="fp32")


def test_logits_without_padding_equal_transformers_own(roberta: Scorer) -> None:
    for scorer in (roberta, bert()):
        for seed in range(4):
            batch = scorer.encoder.encode(pairs(9, seed))
            assert len({len(pair.ids) for pair in batch}) > 3
            result = scorer.infer_logits(batch).tolist()
            assert result == pytest.approx(padded(scorer, batch), abs=1e-5)
            assert max(result) - min(result) > 0.05


def test_a_padding_token_inside_a_text_counts_as_transformers_counts_it(roberta: Scorer) -> None:
    for scorer in (roberta, bert()):
        (usual,) = scorer.encoder.encode(pairs(1))
        ids = list(usual.ids)
        ids[3] = scorer.tokenizer.pad_token_id
        batch = [usual, EncodedPair(ids=tuple(ids), types=usual.types)]
        assert scorer.infer_logits(batch).tolist() == pytest.approx(padded(scorer, batch), abs=1e-5)


def test_gradients_without_padding_equal_transformers_own(roberta: Scorer) -> None:
    for scorer in (roberta, bert()):
        batch = scorer.encoder.encode(pairs(9, 1))
        weights = torch.linspace(-1, 1, len(batch))
        result, expected = (
            torch.autograd.grad((logits * weights).sum(), list(scorer.model.parameters()))
            for logits in (scorer.training_logits(batch), own_logits(scorer, batch))
        )
        for ours, theirs in zip(result, expected, strict=True):
            assert (ours - theirs).abs().max() < 1e-5 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("which", ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"])
def test_dropout_without_padding_is_as_strong_as_transformers_own(which: str) -> None:
    dropouts: dict[str, Any] = {
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout": 0.0,
    }
    scorer = bert(**{**dropouts, which: 0.3})
    batch = scorer.encoder.encode(pairs(5, 2))
    scorer.model.train()
    with torch.no_grad():  # 30 copies a pass: a pass takes about as long with one.
        ours, theirs = (
            torch.stack([logits(batch * 30) for _ in range(50)]).reshape(1500, len(batch)).std(0)
            for logits in (scorer.training_logits, lambda copies: own_logits(scorer, copies))
        )
    assert theirs.min() > 0.01
    assert (ours / theirs - 1).abs().max() < 0.12


def test_gradients_reach_every_weight_that_scoring_uses(make_scorer: Callable[..., Path]) -> None:
    scorer = Scorer.load(str(make_scorer(seed=11)), precision="fp32")
    scorer.score(pairs(4))
    scorer.training_logits(scorer.encoder.encode(pairs(4))).sum().backward()
    assert all(parameter.grad is not None for parameter in scorer.model.parameters())


def test_scores_follow_the_weights_while_a_scorer_is_trained(make_scorer: Callable[..., Path]) -> None:
    scorer = Scorer.load(str(make_scorer(seed=12)), precision="fp32")
    before = scorer.score(pairs(4))
    with torch.no_grad():
        scorer.model.classifier.out_proj.bias += 1.0
        scorer.model.base_model.encoder.layer[0].intermediate.dense.weight *= 1.5
    after = scorer.score(pairs(4))
    assert after != pytest.approx(before, abs=1e-3)
    batch = scorer.encoder.encode(pairs(4))
    assert after == pytest.approx(torch.tensor(padded(scorer, batch)).sigmoid().tolist(), abs=1e-4)


def test_threads_get_the_scores_that_one_alone_gets(roberta: Scorer) -> None:
    work = [pairs(12, seed) for seed in range(24)]
    alone = [roberta.score(part) for part in work]
    with ThreadPoolExecutor(6) as threads:
        for result, expected in zip(threads.map(roberta.score, work), alone, strict=True):
            assert result == pytest.approx(expected, abs=1e-4)


def test_a_tokenizer_set_to_truncate_by_others_cuts_nothing_here(make_scorer: Callable[..., Path]) -> None:
    scorer = Scorer.load(str(make_scorer(seed=13)), precision="fp32")
    expected = scorer.score(pairs(4))
    scorer.tokenizer(["the cat sat on the mat"], truncation=True, max_length=3, padding="max_length")
    assert scorer.score(pairs(4)) == expected


def test_budgets_of_any_size_give_the_same_scores(roberta: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = roberta.score(pairs(30))
    for budget in (1, 60, 100_000):
        monkeypatch.setattr("cappy.scoring.scorer.BATCH_TOKENS", {"cpu": budget})
        assert roberta.score(pairs(30)) == pytest.approx(expected, abs=1e-4)


def test_bf16_scores_stay_near_fp32_with_head_and_activation_in_fp32() -> None:
    for make in (bert, distilled):
        exact, low = make(), make(precision="bf16")
        assert torch.bfloat16 in {tensor.dtype for tensor in (*low.model.parameters(), *low.model.buffers())}
        dtypes = {parameter.dtype for parameter in low.model.classifier.parameters()}
        assert dtypes == {torch.float32}
        batch = low.encoder.encode(pairs(20))
        logits = low.infer_logits(batch)
        assert logits.dtype == torch.float32
        assert not torch.equal(logits, logits.bfloat16().float()), "logits rounded to bf16 make ties"
        assert logits.tolist() == pytest.approx(exact.infer_logits(batch).tolist(), abs=0.3)
        difference = torch.tensor(low.score(pairs(20))) - torch.tensor(exact.score(pairs(20)))
        assert 0 < difference.abs().mean() < 0.05


@pytest.mark.skipif(not has_prepacking(), reason="this processor multiplies no bf16 by oneDNN")
@pytest.mark.parametrize("act", ["gelu", "gelu_new"])
def test_weights_put_in_order_once_give_what_bf16_gives_without(act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ordered = bert(precision="bf16", hidden_act=act)
    maps = [module for module in ordered.model.base_model.encoder.modules() if isinstance(module, torch.nn.Linear)]
    assert not maps, "each of an encoder's linear maps"
    monkeypatch.setattr("cappy.scoring.packed.has_prepacking", lambda: False)
    plain, exact = bert(precision="bf16", hidden_act=act), bert(hidden_act=act)
    near, far = (
        (torch.tensor(ordered.score(pairs(40))) - torch.tensor(other.score(pairs(40)))).abs().mean()
        for other in (plain, exact)
    )
    assert near < 0.02, "a wrong activation is 0.1 off and more"
    assert far < 0.05


def test_auto_is_bf16_only_where_the_processor_has_it(scorer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, expected in (
        ({"avx2": True}, "fp32"),
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda result=capabilities: result)
        assert choose_precision("auto", CPU) == expected
        assert Scorer.load(str(scorer_folder), device="cpu").precision == expected
        assert choose_precision("fp32", CPU) == "fp32"
        assert choose_precision("bf16", CPU) == "bf16"
    assert not has_bf16(torch.device("meta"))
    with pytest.raises(ConfigError, match="precision: .*auto, fp32, bf16.*'fp16'"):
        Scorer.load(str(scorer_folder), precision="fp16")  # type: ignore[arg-type]


def test_a_scorer_in_bf16_is_not_trained(scorer_folder: Path) -> None:
    scorer = Scorer.load(str(scorer_folder), device="cpu", precision="bf16")
    with pytest.raises(ConfigError, match="bf16.*precision fp32"):
        scorer.training_logits(scorer.encoder.encode(pairs(2)))
