"""The very small encoder that the built-in scorer is pretrained from.

    python -m cappy.builtin scorer --target FOLDER

samples from the built-in LLM on the pretraining pool, annotates, and pretrains; every step resumes where it was.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from cappy.annotation.step import AnnotationConfig
from cappy.annotation.step import run as annotation
from cappy.builtin import LLM_FOLDER
from cappy.preparation.step import PreparationConfig
from cappy.preparation.step import run as preparation
from cappy.progress import Progress, silent
from cappy.records import Manifest
from cappy.sampling.step import SamplingConfig
from cappy.sampling.step import run as sampling
from cappy.training.pretraining import PretrainingConfig
from cappy.training.pretraining import run as pretraining

HEAD_SIZE = 32
WORD_SCALE = 0.1
TYPE_SCALE = 0.05
MAX_LENGTH = 256
LEARNING_RATE = 1e-3
BATCH_TOKENS = 1024
"""A forward pass of so many keeps the activations in cache: 160 pairs/s on one core, 125 with 2,048 (one trial)."""


def make(
    target: Path, *, work: Path, num_per_family: int, epochs: float, seed: int, progress: Progress = silent
) -> Manifest:
    """Pretrains the built-in scorer into `target`, over the families that are not held out; resumes where it was."""
    prepared, sampled, annotated = (work / name for name in ("prepared", "sampled", "annotated"))
    preparation(
        PreparationConfig(target=prepared, pool="pretraining", num_per_family=num_per_family, seed=seed, work=work),
        progress,
    )
    sampling(
        SamplingConfig(
            source=prepared, target=sampled, generator=("builtin",), strategy="sampling8", seed=seed, work=work
        ),
        progress,
    )
    annotation(AnnotationConfig(source=sampled, target=annotated, seed=seed, work=work), progress)
    config = PretrainingConfig(
        source=annotated,
        target=target,
        max_length=MAX_LENGTH,
        epochs=epochs,
        learning_rate=LEARNING_RATE,
        batch_tokens=BATCH_TOKENS,
        batch_instances=16,
        max_candidates=16,
        relative=4.0,
        listwise=0.0,
        patience=100,
        seed=seed,
        work=work,
    )
    return pretraining(config, progress)


def new_encoder(layers: int, hidden_size: int, max_length: int) -> tuple[Any, Any]:
    """A randomly initialised BERT with one label, and its tokenizer: the built-in LLM's, with a pair template.

    Two token types tell instruction and response apart. Dropout is low because so small a model underfits. The caller
    seeds torch.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(LLM_FOLDER, trust_remote_code=False)
    tokenizer.add_special_tokens({"cls_token": "<s>", "sep_token": "</s>"})
    specials = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=specials
    )
    tokenizer.model_max_length = max_length
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // HEAD_SIZE,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=max_length,
        hidden_dropout_prob=0.05,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
    )
    model = BertForSequenceClassification(config)
    _lean_to_matching(model)
    return model, tokenizer


@torch.no_grad()
def _lean_to_matching(model: Any) -> None:
    """Starts the weights where comparing is near: words as the LLM knows them, and attention to equals.

    A scorer compares a response with its instruction word by word. With queries and keys alike but quieter (gain 0.7),
    new words and a rate of 8e-4 it had not begun to after 280 updates (loss 1.17); of the four starts then tried for a
    minute each, this one had come furthest after 100 (1.07). What of it matters was not taken apart.

    Queries and keys share a projection, so that a token looks at its equals; the output undoes the value projection;
    types are loud enough to tell where an equal stands.
    """
    words = load_file(LLM_FOLDER / "model.safetensors")["shared.weight"].float()
    embeddings, width = model.bert.embeddings, model.config.hidden_size
    if width != words.shape[1]:  # A random projection keeps what is near, near.
        words = words @ torch.randn(words.shape[1], width)
    embeddings.word_embeddings.weight[: len(words)] = words / words.std() * WORD_SCALE
    embeddings.token_type_embeddings.weight.normal_(0.0, TYPE_SCALE)
    for layer in model.bert.encoder.layer:
        attention = layer.attention
        torch.nn.init.orthogonal_(attention.self.query.weight)
        attention.self.key.weight.copy_(attention.self.query.weight)
        torch.nn.init.orthogonal_(attention.self.value.weight)
        attention.output.dense.weight.copy_(attention.self.value.weight.T)
