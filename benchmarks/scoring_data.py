"""Models and data of the scoring benchmark: RoBERTa's shapes, its tokenizer, real pairs."""

import gzip
import json
import random
from pathlib import Path

import torch
from transformers import RobertaConfig, RobertaForSequenceClassification, RobertaTokenizer

from cappy.scoring import Scorer
from cappy.scoring.config import ScorerConfig

SHARED = Path(__file__).resolve().parents[2] / "shared/data"
SHAPES = {"base": (768, 12, 12), "large": (1024, 24, 16)}
"""Hidden size, layers, heads; the intermediate size is four times the hidden size."""
LENGTH = 512
POOL = 8
"""Maximum number of responses per pool in the measurements of speed."""

Pairs = list[tuple[str, str]]
Pools = list[tuple[str, list[str]]]


def scorer_folder(size: str, work: Path) -> Path:
    """The folder of a scorer of RoBERTa's shape with random weights; created if it is missing."""
    folder = work / size
    if not (folder / "manifest.json").exists():
        torch.manual_seed(0)
        hidden, layers, heads = SHAPES[size]
        tokenizer = roberta_tokenizer()
        config = RobertaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * hidden,
            max_position_embeddings=LENGTH + 2,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
            num_labels=1,
        )
        model = RobertaForSequenceClassification(config).eval()
        Scorer(model, tokenizer, ScorerConfig(head="bce", max_length=LENGTH)).save(folder)
    return folder


def roberta_tokenizer() -> RobertaTokenizer:
    """RoBERTa's tokenizer, from its vocabulary and GPT-2's merges."""
    vocabulary = json.loads((SHARED / "tokenizers/roberta_vocab.json").read_text(encoding="utf-8"))
    lines = (SHARED / "tokenizers/gpt2_vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    merges = [tuple(line.split(" ")) for line in lines if line]
    return RobertaTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def real_pairs(scorer: Scorer, per_set: int) -> Pairs:
    """`per_set` distinct pairs of each set; none exceeds the model's length, because others truncate differently."""
    chosen: Pairs = []
    for path in candidate_files():
        pairs = list(dict.fromkeys((text, response) for text, pool in read_pools(path) for response in pool[:POOL]))
        encoded = scorer.encoder.encode(pairs[: 4 * per_set])
        chosen += [pair for pair, tokens in zip(pairs, encoded, strict=False) if len(tokens.ids) < LENGTH][:per_set]
    return chosen


def candidate_files() -> list[Path]:
    return sorted((SHARED / "candidates").glob("*.jsonl.gz"))


def read_pools(path: Path) -> Pools:
    """Instruction and distinct responses of each row of a file, in a seeded order."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    random.Random(0).shuffle(rows)
    return [
        (row["instruction"], list(dict.fromkeys(candidate["text"] for candidate in row["candidates"]))) for row in rows
    ]
