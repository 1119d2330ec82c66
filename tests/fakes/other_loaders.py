"""How others load a scorer folder: plain transformers with the activation that config.json states, and CrossEncoder."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

Pair = tuple[str, str]
PAIRS: list[Pair] = [
    ("Translate to French: cat", "chat"),
    ("What is 1 + 1?", "2"),
    ("Sort these words: pear fig apple", "apple fig pear"),
    ("Sort these words: pear fig apple", "pear fig apple"),
    ("7 dog blue cat three mat", "mat"),
    ("Say the colour of the sky.", "The sky is blue."),
]


def by_transformers(folder: Path, pairs: Sequence[Pair] = PAIRS) -> list[float]:
    """One pair at a time, nothing truncated; the activation from config.json."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = [model(**tokenizer([one], [two], return_tensors="pt")).logits[0, 0].item() for one, two in pairs]
    stated = json.loads((folder / "config.json").read_text())["sentence_transformers"]["activation_fn"]
    return [1 / (1 + math.exp(-logit)) for logit in logits] if stated.endswith("Sigmoid") else logits


def by_cross_encoder(folder: Path, pairs: Sequence[Pair] = PAIRS) -> list[float]:
    """CrossEncoder.predict at its defaults."""
    from sentence_transformers import CrossEncoder

    values: list[float] = CrossEncoder(str(folder), device="cpu").predict(list(pairs)).tolist()
    return values
