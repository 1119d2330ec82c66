"""Very small encoders with random weights, of every family that training supports, as transformers saves them."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedTokenizerFast

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]
WORDS = "cat dog bird mat tree blue red one two three a b the sat ran flew on in".split()
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.3,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert"},
    "roberta": {"model_type": "roberta", "type_vocab_size": 1},
    "xlm-roberta": {"model_type": "xlm-roberta", "type_vocab_size": 1},
    "mpnet": {"model_type": "mpnet"},
    # Local layers see 4 tokens to either side, and only every second layer is a global one.
    "modernbert": {"model_type": "modernbert", "local_attention": 8, "global_attn_every_n_layers": 2},
    "modernbert-mean": {
        "model_type": "modernbert",
        "local_attention": 8,
        "global_attn_every_n_layers": 2,
        "classifier_pooling": "mean",
    },
    # As in DeBERTa-v3: relative positions alone, in buckets, with the projections of the contents.
    "deberta-v3": {
        "model_type": "deberta-v2",
        "type_vocab_size": 0,
        "relative_attention": True,
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": "p2c|c2p",
        "position_biased_input": False,
        "max_relative_positions": -1,
    },
    "electra": {"model_type": "electra", "embedding_size": 16},
    "albert": {"model_type": "albert", "embedding_size": 16},
}
PACKED = ("bert", "roberta", "xlm-roberta", "mpnet", "modernbert", "modernbert-mean")


def family_config(family: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of a very small model of a family."""
    values = {"vocab_size": len(SPECIALS) + len(WORDS), **SIZES, **FAMILIES[family], **changes}
    return AutoConfig.for_model(**values)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, with RoBERTa's special tokens and token types."""
    vocabulary = {word: number for number, word in enumerate([*SPECIALS, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
        model_max_length=1000,
    )


def save_encoder(family: str, folder: Path, *, masked_lm: bool = False, seed: int = 0, **changes: Any) -> Path:
    """Writes an encoder without a scoring head: its weights alone, or those of a masked language model."""
    torch.manual_seed(seed)
    kind = AutoModelForMaskedLM if masked_lm else AutoModel
    kind.from_config(family_config(family, **changes)).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder
