"""Pretraining: trains a scorer from an encoder, on the annotated instances of many tasks."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from cappy.config import ADVANCED, settings
from cappy.errors import ConfigError, quote
from cappy.hub_client import hub_folder
from cappy.model_folder import ModelFolder, open_model_folder
from cappy.progress import Progress, silent
from cappy.records import Manifest
from cappy.specs import parse_spec
from cappy.training.settings import PAPER_TRUNCATION, TrainingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cappy.scoring import Scorer

_HEAD_SIZE = 32
_WORD_STD = 0.1
_TOKEN_TYPE_STD = 0.05


@settings
class PretrainingConfig(TrainingSettings):
    """Settings of pretraining, which makes a scorer from an encoder."""

    encoder: Annotated[
        str,
        Field(description="Encoder to start from: builtin (a very small new one), a folder or hub:org/name@revision"),
    ] = "builtin"
    head: Annotated[
        Literal["bce", "mse"],
        Field(description="bce: sigmoid with soft labels, scores 0 to 1; mse: the published regression"),
    ] = "bce"
    max_length: Annotated[
        int, Field(ge=16, description="Maximum tokens of a pair; a longer instruction is truncated in the middle")
    ] = 512
    layers: Annotated[int, ADVANCED, Field(ge=1, description="Layers of the built-in encoder")] = 4
    hidden_size: Annotated[
        int, ADVANCED, Field(ge=32, multiple_of=32, description="Width of the built-in encoder, a multiple of 32")
    ] = 160


def run(config: PretrainingConfig, progress: Progress = silent) -> Manifest:
    """Pretrains a scorer on the train split of `source` and writes it to `target`.

    A killed run resumes from its last checkpoint when it is started again.
    """
    import numpy as np

    from cappy.training.train import train

    folder = _open_encoder(config.encoder)
    return train(
        "pretraining",
        config,
        lambda: _make_scorer(config, folder),
        parents=[folder.hash],
        seen_prompts=np.empty(0, dtype="<u8"),
        progress=progress,
    )


def _open_encoder(encoder: str) -> ModelFolder:
    """Opens the encoder's folder; for `builtin`, that of the built-in LLM, whose tokenizer the new encoder uses."""
    spec = parse_spec(encoder)
    if spec.text == "builtin":
        from cappy.builtin import LLM_FOLDER

        return open_model_folder(LLM_FOLDER, pinned=True)
    if spec.kind == "hub":
        return open_model_folder(hub_folder(spec), pinned=True)
    if spec.kind != "path" or not (Path(spec.name) / "config.json").is_file():
        raise ConfigError(
            f"{quote(encoder)}: not an encoder; give builtin, a folder with config.json or hub:org/name@revision"
        )
    return open_model_folder(Path(spec.name))


def _make_scorer(config: PretrainingConfig, folder: ModelFolder) -> "Scorer":
    import torch

    from cappy.scoring import Scorer
    from cappy.scoring.config import ScorerConfig

    torch.manual_seed(config.seed)
    truncation = PAPER_TRUNCATION if config.preset == "paper" else "middle"
    if config.encoder != "builtin":
        return Scorer.from_encoder(folder, head=config.head, max_length=config.max_length, truncation=truncation)
    model, tokenizer = new_encoder(config.layers, config.hidden_size, config.max_length)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    scorer_config = ScorerConfig(head=config.head, max_length=config.max_length, truncation=truncation)
    scorer = Scorer(model, tokenizer, scorer_config)
    scorer.has_new_head = True
    return scorer


def new_encoder(layers: int, hidden_size: int, max_length: int) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Creates an untrained BERT with one label; returns it with the built-in LLM's tokenizer and a template for pairs.

    Token types distinguish instruction and response. Dropout is low because a model this small underfits. The weights
    depend on torch's random seed, which the caller sets.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    from cappy.builtin import LLM_FOLDER

    tokenizer = AutoTokenizer.from_pretrained(LLM_FOLDER, trust_remote_code=False)
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
        num_attention_heads=hidden_size // _HEAD_SIZE,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=max_length,
        hidden_dropout_prob=0.05,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
    )
    model = BertForSequenceClassification(config)
    _initialize_for_matching(model)
    return model, tokenizer


def _initialize_for_matching(model: "PreTrainedModel") -> None:
    """Initialises the weights for comparing words: with the LLM's word embeddings, and attention between equal tokens.

    A scorer compares a response with its instruction word by word. With random word embeddings (tied queries
    and keys, gain 0.7, learning rate 8e-4) the loss was still 1.17 after 280 updates; with this initialisation it was
    1.07 after 100, the best of four that were tried for a minute each. Its parts were not ablated.

    Queries and keys share a projection, so that a token attends to equal ones; the output is the transpose of the value
    projection; token type embeddings are large enough to tell whether an equal token is in the instruction or the
    response.
    """
    import torch
    from safetensors.torch import load_file

    from cappy.builtin import LLM_FOLDER

    with torch.no_grad():
        words = load_file(LLM_FOLDER / "model.safetensors")["shared.weight"].float()
        embeddings, width = model.bert.embeddings, model.config.hidden_size
        if width != words.shape[1]:  # A random projection roughly preserves distances.
            words = words @ torch.randn(words.shape[1], width)
        embeddings.word_embeddings.weight[: len(words)] = words / words.std() * _WORD_STD
        embeddings.token_type_embeddings.weight.normal_(0.0, _TOKEN_TYPE_STD)
        for layer in model.bert.encoder.layer:
            attention = layer.attention
            torch.nn.init.orthogonal_(attention.self.query.weight)
            attention.self.key.weight.copy_(attention.self.query.weight)
            torch.nn.init.orthogonal_(attention.self.value.weight)
            attention.output.dense.weight.copy_(attention.self.value.weight.T)
