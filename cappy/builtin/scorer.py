"""The very small encoder that the built-in scorer is pretrained from."""

from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from cappy.builtin import LLM_FOLDER

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HEAD_SIZE = 32
_WORD_SCALE = 0.1
_TYPE_SCALE = 0.05


def new_encoder(layers: int, hidden_size: int, max_length: int) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A randomly initialised BERT with one label, and its tokenizer: the built-in LLM's, with a pair template.

    Two token types tell instruction and response apart. Dropout is low because so small a model underfits. The caller
    seeds torch.
    """
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


@torch.no_grad()
def _initialize_for_matching(model: "PreTrainedModel") -> None:
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
    embeddings.word_embeddings.weight[: len(words)] = words / words.std() * _WORD_SCALE
    embeddings.token_type_embeddings.weight.normal_(0.0, _TYPE_SCALE)
    for layer in model.bert.encoder.layer:
        attention = layer.attention
        torch.nn.init.orthogonal_(attention.self.query.weight)
        attention.self.key.weight.copy_(attention.self.query.weight)
        torch.nn.init.orthogonal_(attention.self.value.weight)
        attention.output.dense.weight.copy_(attention.self.value.weight.T)
