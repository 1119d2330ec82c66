"""What a scorer folder says of itself: head, length, truncation, and the tokenizer's part of it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

from torch import nn

from cappy.errors import FolderError, shown
from cappy.model_folder import ModelFolder
from cappy.scoring.cross_encoder import ACTIVATIONS, Head, Stated, check_template, read_stated, warn_once

HEADS: tuple[Head, ...] = get_args(Head)
Truncation = Literal["middle", "longest_first"]
"""Where a pair that is too long is cut: inside the instruction, or at the end of the longer text, as published."""
TRUNCATIONS: tuple[Truncation, ...] = get_args(Truncation)

USUAL_LENGTH = 512
"""Tokens of a pair where neither positions nor tokenizer have a limit."""
SHORTEST = 8
UNLIMITED = 10**6
"""From here on a tokenizer's `model_max_length` is no limit; transformers writes 1e30 where nobody set one."""
TOKENIZER_CONFIG = "tokenizer_config.json"
INPUTS = "model_input_names"
TYPES = "token_type_ids"
_GENERAL_TOKENIZERS = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Names that transformers 5 gave to classes, and those under which every version knows them."""
_PASSING = ("is_local", "local_files_only")
"""What transformers writes of the call that loaded a tokenizer."""


class Recorded(TypedDict):
    """What a folder says that transformers does not ask for."""

    head: Head
    max_length: int
    truncation: Truncation


def recorded(folder: ModelFolder, config: Any, tokenizer: Any, model: Any, *, unstated: Head = "bce") -> Recorded:
    """Head, length and truncation of a folder, as every other loader reads them; FolderError for what we do not apply.

    A folder that states no activation has the head `unstated`; the CrossEncoder's default is `bce`.
    """
    stated = read_stated(folder.path, config)
    own = _own(config)
    if stated.renders and not (own and folder.listed):
        check_template(folder.path, getattr(tokenizer, "chat_template", None))
    return {
        "head": stated.head or _own_head(own) or _unstated(folder.path, unstated),
        "max_length": max_length_of(folder, config, tokenizer, model, stated),
        "truncation": truncation_of(config),
    }


def mark_head(config: Any, head: Head, max_length: int, truncation: Truncation = "middle") -> None:
    """Records head, activation, length and, unless it is the usual one, truncation in a configuration."""
    config.cappy = {"head": head, "max_length": max_length}
    if truncation != "middle":
        config.cappy["truncation"] = truncation
    # Where sentence-transformers 4 and later, vLLM and we read the activation, and where versions 2 and 3 do.
    config.sentence_transformers = {"activation_fn": ACTIVATIONS[head]}
    config.sbert_ce_default_activation_function = ACTIVATIONS[head]
    # What makes transformers' own text-classification pipeline apply the identity, or the sigmoid.
    config.problem_type = "regression" if head == "mse" else "multi_label_classification"


def write_tokenizer(tokenizer: Any, folder: Path, max_length: int, *, types: bool) -> None:
    """Writes a tokenizer so that whoever loads it gives the model what we give it: inputs, length, no chat template.

    `types` says whether the model is given token types.
    """
    tokenizer.save_pretrained(folder)
    for path in folder.glob("chat_template*"):
        path.unlink()
    path = folder / TOKENIZER_CONFIG
    values = json.loads(path.read_text(encoding="utf-8"))
    for passing in ("chat_template", *_PASSING):
        values.pop(passing, None)
    name = str(values.get("tokenizer_class"))
    values |= {
        "tokenizer_class": _GENERAL_TOKENIZERS.get(name, values.get("tokenizer_class")),
        "model_max_length": max_length,
        INPUTS: [name for name in tokenizer.model_input_names if types or name != TYPES],
    }
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def mend_token_types(folder: ModelFolder, config: Any, tokenizer: Any) -> None:
    """Lets a tokenizer that an earlier release wrote say that it makes token types, which its scorer was trained with.

    That release gave token types to every model that has them, and left out of the file that the tokenizer makes them.
    """
    path = folder.path / TOKENIZER_CONFIG
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if folder.listed and _own(config) and INPUTS not in values and use_token_types(tokenizer, config):
        remedy = "other loaders score it without them until it is saved again: Scorer.load(...).save(...)"
        warn_once(folder.path, f"its tokenizer's file does not name token types, which are used here; {remedy}")


def use_token_types(tokenizer: Any, config: Any) -> bool:
    """Makes a tokenizer give the token types that its model has to whoever calls it; whether it did not before."""
    if (getattr(config, "type_vocab_size", 0) or 0) < 2 or TYPES in tokenizer.model_input_names:
        return False
    if not any(tokenizer("a", "b", return_token_type_ids=True)[TYPES]):
        return False
    tokenizer.model_input_names = ["input_ids", TYPES, "attention_mask"]
    return True


def refuse_labels(folder: Path, config: Any) -> None:
    """FolderError where a configuration has another number of labels than one."""
    if config.num_labels != 1:
        raise FolderError(f"{folder}: has {config.num_labels} labels; a scorer has one")


def truncation_of(config: Any) -> Truncation:
    """The recorded truncation, else `middle`; in a folder of others that of CrossEncoder, `longest_first`.

    FolderError where the recorded one is none that is known.
    """
    own = _own(config)
    recorded = own.get("truncation", "middle" if own else "longest_first")
    for truncation in TRUNCATIONS:
        if truncation == recorded:
            return truncation
    known = " or ".join(TRUNCATIONS)
    raise FolderError(f"config.json: cappy.truncation must be {known}, got {shown(json.dumps(recorded))}")


def max_length_of(folder: ModelFolder, config: Any, tokenizer: Any, model: Any, stated: Stated) -> int:
    """Tokens of a pair: what we recorded, else what the CrossEncoder reads; never more than the model has positions."""
    recorded = _own(config).get("max_length")
    if recorded is not None:
        _check_length(recorded, "config.json: cappy.max_length")
    of_tokenizer = stated.max_length
    if of_tokenizer is None:
        found = getattr(tokenizer, "model_max_length", None)
        of_tokenizer = int(found) if isinstance(found, int | float) and found < UNLIMITED else None
    if of_tokenizer is not None:
        _check_length(of_tokenizer, f"{TOKENIZER_CONFIG}: model_max_length")
    if recorded is not None and folder.listed:
        # Earlier releases did not write the length into the tokenizer's file.
        of_tokenizer = None
    limits = [limit for limit in (recorded, of_tokenizer, positions_of(model)) if limit is not None]
    return min(limits, default=USUAL_LENGTH)


def positions_of(model: Any) -> int | None:
    """How many tokens a model has positions for, None where their number has no bound.

    RoBERTa and its relatives count positions from behind the padding's number, so they have fewer than their table.
    """
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    for module in model.modules():
        padding, table = getattr(module, "padding_idx", None), getattr(module, "position_embeddings", None)
        if isinstance(padding, int) and isinstance(table, nn.Embedding):
            return min(positions, table.num_embeddings) - padding - 1
    return positions


def _check_length(length: Any, where: str) -> None:
    if not isinstance(length, int) or isinstance(length, bool) or length < SHORTEST:
        raise FolderError(f"{where} must be at least {SHORTEST} tokens, got {shown(json.dumps(length))}")


def _own(config: Any) -> Mapping[str, Any]:
    """What this project recorded in a configuration."""
    own = getattr(config, "cappy", None) or {}
    if not isinstance(own, Mapping):
        raise FolderError(f"config.json: cappy must be an object, got {shown(json.dumps(own))}")
    return own


def _own_head(own: Mapping[str, Any]) -> Head | None:
    return next((head for head in HEADS if head == own.get("head")), None)


def _unstated(folder: Path, head: Head) -> Head:
    if head == "bce":
        remedy = "for raw numbers write sentence_transformers.activation_fn into its config.json"
        warn_once(folder, f"states no activation; scores are the sigmoid, as CrossEncoder's are; {remedy}")
    else:
        warn_once(
            folder, "states no activation; scores are raw, as the published scorer's; CrossEncoder's are a sigmoid"
        )
    return head
