"""The scorers that JAX is compared on; tests/training/test_tpu.py says how these tests are run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from cappy.builtin import TINY_SCORER_FOLDER
from cappy.scoring import Scorer
from cappy.scoring.config import ScorerConfig

Load = Callable[..., Scorer]


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers with the head `bce` and two token types, without dropout."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = AutoTokenizer.from_pretrained(TINY_SCORER_FOLDER)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
        num_labels=1,
        initializer_range=0.3,
    )
    Scorer(BertForSequenceClassification(config).eval(), tokenizer, ScorerConfig(head="bce", max_length=64)).save(
        folder
    )
    return folder


@pytest.fixture(scope="session")
def bert(bert_folder: Path) -> Load:
    """bert(dropout=0.0) -> a fresh scorer of that folder on the CPU."""
    return lambda dropout=0.0: _fresh(bert_folder, dropout)


@pytest.fixture(scope="session", params=["roberta", "bert"])
def load(request: pytest.FixtureRequest, make_scorer: Callable[..., Path], bert_folder: Path) -> Load:
    """As `bert`, once more with a random RoBERTa with the head `mse`."""
    folder = make_scorer(head="mse", max_length=64) if request.param == "roberta" else bert_folder
    return lambda dropout=0.0: _fresh(folder, dropout)


def _fresh(folder: Path, dropout: float) -> Scorer:
    scorer = Scorer.load(str(folder), device="cpu", precision="fp32")
    weights, config = scorer.model.state_dict(), scorer.model.config
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    scorer.model = type(scorer.model)(config).eval()
    scorer.model.load_state_dict(weights)
    return scorer
