"""The model of a scorer: loading its weights, batches of pairs, padded inputs, and the precision of a forward pass.

Head and activation run in fp32 whatever the precision of the body. In bf16 on a CPU, torch reorders the weights of a
linear layer for the matrix instructions at every call. `PrepackedLinear` does it once, with the operators that torch's
compiler uses. They are not public, so `has_prepacking` tries them, and without them scoring is only slower.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from cappy.errors import ConfigError, FolderError, quote
from cappy.model_folder import ModelFolder
from cappy.scorers import read_modules
from cappy.scoring.config import ChosenPrecision, Precision
from cappy.scoring.encoding import EncodedPair
from cappy.scoring.folder import NEW_HEAD_REMEDY, check_modules, check_single_label, has_scorer_settings

_HEADS = re.compile(r"(pre_classifier|classifier|classification_head|score|logits_proj|sequence_summary)\.")
"""Matches the names of parameters of classification heads; a masked language model has none of them."""
_ENCODER_CLASSES = ("Model", "ForMaskedLM", "ForPreTraining")
"""Endings of the names of transformers' classes of encoders without a head for a task."""
_LLM_CLASSES = ("LMHeadModel", "DoubleHeadsModel")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")


def is_encoder(folder: ModelFolder, config: PreTrainedConfig, *, strict: bool = True) -> bool:
    """Whether a folder has an encoder, which training gives a new head, instead of a scorer.

    A folder whose configuration names a classifier is a scorer, even if its weights lack the head. Raises FolderError
    if it has modules of sentence-transformers that are not applied or, with `strict`, a model for another task.
    """
    check_modules(folder.path)
    names = config.architectures or ()
    if any(name.endswith("ForSequenceClassification") for name in names) or (not names and has_scorer_settings(config)):
        return False
    others = [name for name in names if not name.endswith(_ENCODER_CLASSES) or name.endswith(_LLM_CLASSES)]
    if strict and others:
        remedy = "give a scorer or an encoder (a ...Model or ...ForMaskedLM of transformers)"
        raise FolderError(f"{folder.path}: is a {others[0]}, neither a scorer nor an encoder; {remedy}")
    return not any(_HEADS.match(name) for path in folder.path.glob("*.safetensors") for name in _tensor_names(path))


def describe_modules(folder: Path) -> str:
    """The modules of a model of sentence-transformers after its encoder, as text; "" if there are none."""
    return ", ".join(name for name, _ in read_modules(folder)[1:])


def require_tokenizer(folder: Path) -> None:
    """Raises FolderError if an encoder's folder has no tokenizer: transformers would create an empty one."""
    if not any(path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)):
        remedy = "save the tokenizer beside the weights (tokenizer.save_pretrained)"
        raise FolderError(f"{folder}: has no tokenizer ({_TOKENIZER_FILES[0]} or a vocabulary); {remedy}")


def _tensor_names(path: Path) -> list[str]:
    """The names of the tensors in a safetensors file. Raises FolderError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise FolderError(
            f"{path}: is damaged or not safetensors ({quote(str(error), 80)}); download it again"
        ) from None


def load_weights(
    folder: ModelFolder, config: PreTrainedConfig, *, new_head: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer. Raises FolderError if weights other than those of a new head are missing."""
    disable_progress_bar()
    set_verbosity_error()  # transformers prints a table of the weights that a folder lacks; they are checked here.
    if not new_head:
        check_single_label(folder.path, config)
    model, missing = folder.model(AutoModelForSequenceClassification, config)
    body = f"{model.base_model_prefix}."
    lacking = [name for name in missing if not new_head or (name.startswith(body) and ".pooler." not in name)]
    if lacking:
        remedy = "download them again" + ("" if new_head else f"; {NEW_HEAD_REMEDY}")
        raise FolderError(f"{folder.path}: its weights lack {lacking[0]}; {remedy}")
    tokenizer = folder.tokenizer()
    if (highest := max(tokenizer.get_vocab().values(), default=0)) >= model.get_input_embeddings().num_embeddings:
        remedy = "save the tokenizer of its training in this folder"
        raise FolderError(f"{folder.path}: its tokenizer has token {highest}, which the model lacks; {remedy}")
    return model, tokenizer


def batch_by_length(encoded: Sequence[EncodedPair], budget: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, with at most `budget` padded tokens (or a single pair)."""
    batch: list[int] = []
    for index in sorted(range(len(encoded)), key=lambda i: -len(encoded[i].ids)):
        if batch and (len(batch) + 1) * len(encoded[batch[0]].ids) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def padding_token_id(config: "PreTrainedConfig") -> int | None:
    """The id of the padding token, from which the model derives the last token or the positions of a pair.

    None if the model has no valid one, or if its head reads the last position including padding (XLNet): then pairs are
    computed one at a time.
    """
    text = config.get_text_config()
    pad = None if getattr(text, "summary_type", "") == "last" else getattr(text, "pad_token_id", None)
    return pad if isinstance(pad, int) and 0 <= pad < text.vocab_size else None


def collate(batch: Sequence[EncodedPair], *, pad: int, token_types: bool, device: torch.device) -> dict[str, Tensor]:
    """Right-padded inputs (pairs, longest) on the device: ids, mask and, with `token_types`, token types."""
    longest = max(len(pair.ids) for pair in batch)
    padding = [longest - len(pair.ids) for pair in batch]
    inputs = {
        "input_ids": torch.tensor([[*pair.ids, *(pad,) * count] for pair, count in zip(batch, padding, strict=True)]),
        "attention_mask": torch.tensor(
            [[1] * len(pair.ids) + [0] * count for pair, count in zip(batch, padding, strict=True)]
        ),
    }
    if token_types:
        inputs["token_type_ids"] = torch.tensor(
            [[*pair.types, *(0,) * count] for pair, count in zip(batch, padding, strict=True)]
        )
    return {name: value.to(device) for name, value in inputs.items()}


PREPACKED_ROWS = 8192
"""Number of input rows for which the order of the weights is optimised; inputs may have any number of rows."""
Activation = Literal["none", "gelu"]


@cache
def has_prepacking() -> bool:
    """Whether torch has the operators and the processor has the instructions; tries them on a small layer."""
    try:
        with torch.inference_mode():
            PrepackedLinear(nn.Linear(2, 2))(torch.zeros(1, 2, dtype=torch.bfloat16))
    except (AttributeError, RuntimeError):
        return False
    return True


class PrepackedLinear(nn.Module):
    """Equivalent to a `Linear` in bf16, optionally with an exact GELU after it; without gradients."""

    def __init__(self, linear: nn.Linear, activation: Activation = "none") -> None:
        super().__init__()
        weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(torch.bfloat16), PREPACKED_ROWS)
        self.register_buffer("weight", weight, persistent=False)
        self.bias = None if linear.bias is None else linear.bias.detach().to(torch.bfloat16)
        self.activation = activation

    def forward(self, rows: Tensor) -> Tensor:
        """(rows, out) in bf16 from (rows, in) in bf16."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, self.activation, [], "none")
        return output


def choose_precision(precision: Precision, device: torch.device) -> ChosenPrecision:
    """Resolves `auto`: bf16 if the device has instructions for it, else fp32. Raises ConfigError for unknown values."""
    if precision not in get_args(Precision):
        raise ConfigError(f"precision: must be one of {', '.join(get_args(Precision))}, got {quote(precision)}")
    if precision == "auto":
        return "bf16" if has_bf16(device) else "fp32"
    return precision


def has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for matrix products in bf16 (on a CPU: AMX or AVX512-BF16)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return False


def convert_body_to_bf16(model: "PreTrainedModel") -> None:
    """Converts the whole body to bf16, for encoders of unknown architecture; the head runs in fp32."""
    model.base_model.to(torch.bfloat16)
    for head in _heads(model):
        head.float().register_forward_pre_hook(_to_fp32)


def keep_heads_in_fp32(model: "PreTrainedModel") -> None:
    """Makes the modules after the body run in fp32 even under autocast."""
    for head in _heads(model):
        contexts: list[AbstractContextManager[object]] = []
        head.register_forward_pre_hook(partial(_disable_autocast, contexts))
        head.register_forward_hook(partial(_restore_autocast, contexts), always_call=True)


def _heads(model: "PreTrainedModel") -> list[nn.Module]:
    """The modules after the body, including its own pooler."""
    body = model.base_model
    after = [child for child in model.children() if child is not body]
    return after + [child for name, child in body.named_children() if name == "pooler"]


def _disable_autocast(
    contexts: list[AbstractContextManager[object]], module: nn.Module, inputs: tuple[object, ...]
) -> tuple[object, ...]:
    contexts.append(torch.autocast(next(module.parameters(), torch.empty(0)).device.type, enabled=False))
    contexts[-1].__enter__()
    return _to_fp32(module, inputs)


def _restore_autocast(contexts: list[AbstractContextManager[object]], *_: object) -> None:
    contexts.pop().__exit__(None, None, None)


def _to_fp32(_: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(
        value.float() if isinstance(value, Tensor) and value.is_floating_point() else value for value in inputs
    )
