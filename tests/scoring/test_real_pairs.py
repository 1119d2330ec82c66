"""Real pairs, a RoBERTa with RoBERTa's own vocabulary: one number from us, from transformers and from CrossEncoder."""

import gzip
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaTokenizer,
)

from cappy.scoring import Scorer
from cappy.scoring.config import ScorerConfig

SHARED = Path(__file__).resolve().parents[3] / "shared/data"
LENGTH = 512

pytestmark = pytest.mark.skipif(not (SHARED / "candidates").is_dir(), reason="../shared/data is not here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scorer folder: random weights, wide enough that scores differ."""
    tokenizers = SHARED / "tokenizers"
    vocabulary = json.loads((tokenizers / "roberta_vocab.json").read_text(encoding="utf-8"))
    lines = (tokenizers / "gpt2_vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    merges = [tuple(line.split(" ")) for line in lines if line]
    tokenizer = RobertaTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=LENGTH + 2,
        type_vocab_size=1,
        initializer_range=0.2,
        num_labels=1,
    )
    model = RobertaForSequenceClassification(config).eval()
    target = tmp_path_factory.mktemp("real") / "scorer"
    Scorer(model, tokenizer, ScorerConfig(head="bce", max_length=LENGTH)).save(target)
    return target


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Scorer:
    return Scorer.load(str(folder), device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def pools(scorer: Scorer) -> list[tuple[str, list[str]]]:
    """Pools of every set whose pairs are within the model's length."""
    result = []
    for path in sorted((SHARED / "candidates").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        for row in random.Random(0).sample(rows, 8):
            texts = [candidate["text"] for candidate in row["candidates"][:6]]
            encoded = scorer.encoder.encode([(row["instruction"], text) for text in texts])
            if texts and max(len(pair.ids) for pair in encoded) < LENGTH:
                result.append((row["instruction"], texts))
    return result


@pytest.fixture(scope="module")
def pairs(pools: list[tuple[str, list[str]]]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((instruction, text) for instruction, texts in pools for text in texts))


@pytest.fixture(scope="module")
def scores(scorer: Scorer, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], float]:
    return dict(zip(pairs, scorer.score(pairs), strict=True))


def test_scores_equal_plain_transformers_one_pair_at_a_time(
    folder: Path, pairs: list[tuple[str, str]], scores: dict[tuple[str, str], float]
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(pairs) > 150
    with torch.no_grad():
        for pair in pairs:
            # Lists, because a tokenizer given an empty text on its own takes the pair for a single text.
            plain = model(**tokenizer([pair[0]], [pair[1]], return_tensors="pt")).logits.sigmoid().item()
            assert scores[pair] == pytest.approx(plain, abs=1e-4), pair
    assert max(scores.values()) - min(scores.values()) > 0.1


def test_scores_equal_cross_encoder(
    folder: Path, pairs: list[tuple[str, str]], scores: dict[tuple[str, str], float]
) -> None:
    from sentence_transformers import CrossEncoder

    peer = CrossEncoder(str(folder), device="cpu").predict(pairs).tolist()
    assert [scores[pair] for pair in pairs] == pytest.approx(peer, abs=1e-4)


def test_a_pool_alone_has_the_scores_and_the_pick_that_it_has_in_company(
    scorer: Scorer, pools: list[tuple[str, list[str]]], scores: dict[tuple[str, str], float]
) -> None:
    for instruction, texts in pools:
        selection = scorer.select(instruction, texts)
        together = [scores[instruction, text] for text in texts]
        assert selection.scores == pytest.approx(together, abs=1e-4)
        assert max(together) - together[selection.index] <= 1e-4, "another pick only among ties"
