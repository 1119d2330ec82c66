"""Reads and writes the configuration of a scorer folder: head, length, truncation, and the tokenizer's files.

The settings of sentence-transformers' CrossEncoder are read too, from the same files and in the same order as its
version 6.2, which reads the files of versions 2 to 5. A setting that it would apply and that is not supported here is
an error, so that a folder gives the same scores everywhere.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from cappy.errors import FolderError, quote
from cappy.model_folder import ModelFolder
from cappy.scorers import MODULES, read_modules
from cappy.scoring.config import HEADS, TRUNCATIONS, Head, ScorerConfig, Truncation
from cappy.untrusted import JSON

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

LOGGER = logging.getLogger(__name__)

SETTINGS = "config_sentence_transformers.json"
TRANSFORMER_FAMILIES = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
TRANSFORMER_FILES = tuple(f"sentence_{family}_config.json" for family in TRANSFORMER_FAMILIES)
"""The first of these files that exists configures the folder's Transformer module."""
CHAT_TEMPLATE = "chat_template.jinja"
FILES = (MODULES, SETTINGS, *TRANSFORMER_FILES, CHAT_TEMPLATE)
"""Files that change the CrossEncoder's scores; folders written here have none of them."""

ACTIVATIONS: Mapping[Head, str] = {
    "mse": "torch.nn.modules.linear.Identity",
    "bce": "torch.nn.modules.activation.Sigmoid",
}
"""The activation of each head, in the notation of sentence-transformers."""
_HEADS: Mapping[str, Head] = {"Identity": "mse", "Sigmoid": "bce"}
_OLD_ACTIVATION_KEY = "sbert_ce_default_activation_function"
_WITHOUT_EFFECT = {"modality_config", "module_output_name", "unpad_inputs", "query_length", "document_length"}
_UNSUPPORTED = {
    "do_lower_case": "lowers the case of every text",
    "processing_kwargs": "changes how texts are encoded",
    "tokenizer_args": "changes how the tokenizer is loaded",
    "processor_kwargs": "changes how the tokenizer is loaded",
    "tokenizer_name_or_path": "takes the tokenizer from elsewhere",
    "model_args": "changes how the model is loaded",
    "model_kwargs": "changes how the model is loaded",
    "config_args": "changes the model's configuration",
    "config_kwargs": "changes the model's configuration",
    "query_expansion": "appends tokens to texts",
}
_WARNED: set[tuple[Path, str]] = set()


@dataclass(frozen=True, kw_only=True)
class FolderSettings:
    """The settings in a folder: head (None without an activation) and maximum tokens of a pair (None if not set).

    `uses_chat_template` says whether CrossEncoder would render pairs with the tokenizer's chat template, if it has one.
    """

    head: Head | None
    max_length: int | None = None
    uses_chat_template: bool = True


def _read_settings(folder: Path, config: "PreTrainedConfig") -> FolderSettings:
    """Reads the settings in a folder. Raises FolderError for unsupported modules, prompts and activations."""
    settings = _read_object(folder / SETTINGS)
    if not (folder / MODULES).is_file() or settings.get("model_type", "SentenceTransformer") != "CrossEncoder":
        return FolderSettings(head=_head_of_config(folder, config))
    check_modules(folder)
    _check_prompt(folder / SETTINGS, settings)
    transformer = next((path for name in TRANSFORMER_FILES if (path := folder / name).is_file()), None)
    values = _read_object(transformer) if transformer else {}
    length = _transformer_length(transformer, values) if transformer else None
    modalities = values.get("modality_config")
    head = _parse_head(settings.get("activation_fn"), f"{folder / SETTINGS}: activation_fn")
    return FolderSettings(
        head=head or _head_of_config(folder, config),
        max_length=length,
        uses_chat_template=isinstance(modalities, Mapping | Sequence) and "message" in modalities,
    )


def _check_template(folder: Path, template: object) -> None:
    """Raises FolderError if the chat template renders pairs, which is not supported; logs a warning for any other."""
    if not template:
        return
    if all(role in json.dumps(template) for role in ("query", "document")):
        remedy = (
            f"delete it ({CHAT_TEMPLATE}, or its entry in tokenizer_config.json) if the scorer was trained without it"
        )
        raise FolderError(
            f"{folder}: has a chat template for pairs (query, document), which is not applied here; {remedy}"
        )
    warn_once(folder, "has a chat template; pairs are encoded without it, as in transformers")


def warn_once(folder: Path, text: str) -> None:
    """Logs a warning about a folder once per process."""
    if (folder, text) not in _WARNED:
        _WARNED.add((folder, text))
        LOGGER.warning("%s: %s", folder, text)


def _head_of_config(folder: Path, config: "PreTrainedConfig") -> Head | None:
    where, settings = folder / "config.json", getattr(config, "sentence_transformers", None)
    if settings is not None and not isinstance(settings, Mapping):
        raise FolderError(f"{where}: sentence_transformers must be an object, got {quote(json.dumps(settings))}")
    if settings is not None and "activation_fn" in settings:
        return _parse_head(settings["activation_fn"], f"{where}: sentence_transformers.activation_fn")
    return _parse_head(getattr(config, _OLD_ACTIVATION_KEY, None), f"{where}: {_OLD_ACTIVATION_KEY}")


def _parse_head(path: object, where: str) -> Head | None:
    if path is None:
        return None
    head = _HEADS.get(path.rpartition(".")[2]) if isinstance(path, str) and path.startswith("torch.nn.") else None
    if head is None:
        supported = " or ".join(ACTIVATIONS.values())
        name = quote(json.dumps(path), 80)
        raise FolderError(f"{where}: is {name}, which is not applied here; it must be {supported}")
    return head


def check_modules(folder: Path) -> None:
    """Raises FolderError if a model of sentence-transformers has modules that neither scoring nor training applies.

    A CrossEncoder must be one Transformer. Of other models, the first module is the encoder; the others are not needed.
    """
    modules = read_modules(folder)
    names = [name for name, _ in modules]
    is_cross_encoder = _read_object(folder / SETTINGS).get("model_type", "SentenceTransformer") == "CrossEncoder"
    if not modules or (names == ["Transformer"] and not modules[0][1]):
        return
    if not is_cross_encoder and names[0] in ("Transformer", "MLMTransformer") and not modules[0][1]:
        return
    remedy = "give a model whose first module is a Transformer"
    if names[0] == "Transformer":
        remedy = f"to start from its encoder with a new head, delete {MODULES} and the folders of its modules"
    if "LogitScore" in names:
        remedy = "give a CrossEncoder that is not a causal LLM"
    other = next((name for name in names if name != "Transformer"), "Transformer in a folder of its own")
    problem = f"names the modules {quote(', '.join(names), 80)}, but {other} is not applied here"
    raise FolderError(
        f"{folder / MODULES}: {problem}; a scorer must have one Transformer in the folder itself; {remedy}"
    )


def has_scorer_settings(config: "PreTrainedConfig") -> bool:
    """Whether a model configuration has settings of a scorer: those of this project, or an activation of scores."""
    settings = getattr(config, "sentence_transformers", None)
    has_activation = isinstance(settings, Mapping) and "activation_fn" in settings
    return bool(_read_recorded(config)) or has_activation or getattr(config, _OLD_ACTIVATION_KEY, None) is not None


def _check_prompt(path: Path, settings: Mapping[str, JSON]) -> None:
    name = settings.get("default_prompt_name")
    prompts = settings.get("prompts") or {}
    if name is None or (isinstance(name, str) and isinstance(prompts, Mapping) and prompts.get(name) == ""):
        return
    remedy = "set it to null and start instructions with the prompt"
    raise FolderError(f"{path}: default_prompt_name {quote(str(name))} is not applied here; {remedy}")


def _transformer_length(path: Path, values: Mapping[str, JSON]) -> int | None:
    """Maximum tokens of a pair, None if not set. Raises FolderError for settings that are not supported here."""
    if (task := values.get("transformer_task", "sequence-classification")) != "sequence-classification":
        raise FolderError(
            f"{path}: transformer_task is {quote(json.dumps(task))}; a scorer needs sequence-classification"
        )
    for name in values.keys() - _WITHOUT_EFFECT - {"transformer_task", "max_seq_length"}:
        if name not in _UNSUPPORTED:
            raise FolderError(f"{path}: unknown setting {quote(name)}; remove it if it does not change scores")
        if values[name]:
            raise FolderError(
                f"{path}: {name} {_UNSUPPORTED[name]}, which is not supported here; save the scorer without it"
            )
    length = values.get("max_seq_length")
    return None if length is None else _check_length(length, f"{path}: max_seq_length")


def _read_object(path: Path) -> Mapping[str, JSON]:
    values = _read_json(path) if path.is_file() else {}
    if not isinstance(values, Mapping):
        raise FolderError(f"{path}: must be an object, got {quote(json.dumps(values), 40)}; download the folder again")
    return values


def _read_json(path: Path) -> JSON:
    try:
        values: JSON = json.loads(path.read_bytes())
    except ValueError as error:
        raise FolderError(f"{path}: is not JSON ({quote(str(error), 80)}); download the folder again") from error
    return values


DEFAULT_MAX_LENGTH = 512
"""Maximum tokens of a pair if neither positions nor tokenizer have a limit."""
MIN_MAX_LENGTH = 8
UNLIMITED = 10**6
"""A tokenizer's `model_max_length` of at least this is not a limit; transformers writes 1e30 if it is not set."""
TOKENIZER_CONFIG = "tokenizer_config.json"
INPUT_NAMES = "model_input_names"
TYPES_INPUT = "token_type_ids"
NEW_HEAD_REMEDY = "to train a new head, save the encoder alone (AutoModel) beside its tokenizer, and start from that"
_COMPATIBLE_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Class names of transformers 5 -> names that every version knows."""
_LOAD_ARGUMENTS = ("is_local", "local_files_only")
"""Arguments of the loading call that transformers writes into the tokenizer's file."""


def read_config(
    folder: ModelFolder,
    config: "PreTrainedConfig",
    tokenizer: "PreTrainedTokenizerBase",
    model: "PreTrainedModel",
    *,
    default_head: Head = "bce",
) -> ScorerConfig:
    """Reads head, length and truncation of a folder; its settings have the same precedence as in sentence-transformers.

    Raises FolderError for unsupported settings.

    The head of a folder without an activation is `default_head`; the CrossEncoder's default is `bce`.
    """
    settings = _read_settings(folder.path, config)
    recorded = _read_recorded(config)
    if settings.uses_chat_template and not (recorded and folder.has_manifest):
        _check_template(folder.path, getattr(tokenizer, "chat_template", None))
    return ScorerConfig(
        head=settings.head or _recorded_head(recorded) or _warn_default_head(folder.path, default_head),
        max_length=_find_max_length(folder, config, tokenizer, model, settings),
        truncation=_read_truncation(config),
    )


def record_config(config: "PreTrainedConfig", scorer_config: ScorerConfig) -> None:
    """Records head, activation, length and, unless it is the default, truncation in a model configuration."""
    config.cappy = {"head": scorer_config.head, "max_length": scorer_config.max_length}
    if scorer_config.truncation != "middle":
        config.cappy["truncation"] = scorer_config.truncation
    # The first key is read by sentence-transformers 4 and later, vLLM and cappy, the second by versions 2 and 3.
    config.sentence_transformers = {"activation_fn": ACTIVATIONS[scorer_config.head]}
    config.sbert_ce_default_activation_function = ACTIVATIONS[scorer_config.head]
    # Makes the text-classification pipeline of transformers apply the identity, or the sigmoid.
    config.problem_type = "regression" if scorer_config.head == "mse" else "multi_label_classification"


def write_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path, max_length: int, *, token_types: bool) -> None:
    """Writes a tokenizer so that other loaders make the same inputs: token types, length, no chat template.

    `token_types`: whether the model takes token types.
    """
    tokenizer.save_pretrained(folder)
    for path in folder.glob("chat_template*"):
        path.unlink()
    path = folder / TOKENIZER_CONFIG
    values = json.loads(path.read_text(encoding="utf-8"))
    for key in ("chat_template", *_LOAD_ARGUMENTS):
        values.pop(key, None)
    name = str(values.get("tokenizer_class"))
    values |= {
        "tokenizer_class": _COMPATIBLE_CLASSES.get(name, values.get("tokenizer_class")),
        "model_max_length": max_length,
        INPUT_NAMES: [name for name in tokenizer.model_input_names if token_types or name != TYPES_INPUT],
    }
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def restore_token_types(folder: ModelFolder, config: "PreTrainedConfig", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Makes a tokenizer from an earlier release return token types, which its scorer was trained with.

    That release used token types for every model that has them, but did not record it in the tokenizer's file.
    """
    path = folder.path / TOKENIZER_CONFIG
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if (
        folder.has_manifest
        and _read_recorded(config)
        and INPUT_NAMES not in values
        and use_token_types(tokenizer, config)
    ):
        remedy = "other loaders do not use them until it is saved again: Scorer.load(...).save(...)"
        warn_once(folder.path, f"its tokenizer's file does not name token types, which are used here; {remedy}")


def use_token_types(tokenizer: "PreTrainedTokenizerBase", config: "PreTrainedConfig") -> bool:
    """Makes a tokenizer return the token types that its model has; returns whether this changed it."""
    if (getattr(config, "type_vocab_size", 0) or 0) < 2 or TYPES_INPUT in tokenizer.model_input_names:
        return False
    if not any(tokenizer("a", "b", return_token_type_ids=True)[TYPES_INPUT]):
        return False
    tokenizer.model_input_names = ["input_ids", TYPES_INPUT, "attention_mask"]
    return True


def check_single_label(folder: Path, config: "PreTrainedConfig") -> None:
    """Raises FolderError if a configuration does not have exactly one label."""
    if config.num_labels != 1:
        raise FolderError(f"{folder}: has {config.num_labels} labels; a scorer must have one; {NEW_HEAD_REMEDY}")


def _read_truncation(config: "PreTrainedConfig") -> Truncation:
    """The recorded truncation, by default `middle`; for folders of other tools, CrossEncoder's `longest_first`.

    Raises FolderError if the recorded one is unknown.
    """
    recorded = _read_recorded(config)
    name = recorded.get("truncation", "middle" if recorded else "longest_first")
    for truncation in TRUNCATIONS:
        if truncation == name:
            return truncation
    supported = " or ".join(TRUNCATIONS)
    raise FolderError(f"config.json: cappy.truncation must be {supported}, got {quote(json.dumps(name))}")


def _find_max_length(
    folder: ModelFolder,
    config: "PreTrainedConfig",
    tokenizer: "PreTrainedTokenizerBase",
    model: "PreTrainedModel",
    settings: FolderSettings,
) -> int:
    """The minimum of the recorded length, CrossEncoder's length and the model's positions.

    With a manifest, CrossEncoder's length is ignored if a length is recorded. If there is none of these, the length is
    `DEFAULT_MAX_LENGTH`.
    """
    recorded_length = _read_recorded(config).get("max_length")
    recorded = None if recorded_length is None else _check_length(recorded_length, "config.json: cappy.max_length")
    cross_encoder_length = settings.max_length
    if cross_encoder_length is None:
        limit = getattr(tokenizer, "model_max_length", None)
        if isinstance(limit, int | float) and limit < UNLIMITED:
            cross_encoder_length = _check_length(int(limit), f"{TOKENIZER_CONFIG}: model_max_length")
    if recorded is not None and folder.has_manifest:
        # Earlier releases did not write the length into the tokenizer's file.
        cross_encoder_length = None
    limits = [limit for limit in (recorded, cross_encoder_length, max_positions(model)) if limit is not None]
    return min(limits, default=DEFAULT_MAX_LENGTH)


def max_positions(model: "PreTrainedModel") -> int | None:
    """Number of positions of a model, None if unlimited.

    RoBERTa and related models number positions from padding id + 1, so fewer positions are usable than the embedding
    table has rows.
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


def _check_length(length: object, where: str) -> int:
    if not isinstance(length, int) or isinstance(length, bool) or length < MIN_MAX_LENGTH:
        raise FolderError(f"{where} must be at least {MIN_MAX_LENGTH} tokens, got {quote(json.dumps(length))}")
    return length


def _read_recorded(config: "PreTrainedConfig") -> Mapping[str, JSON]:
    """The settings that this project recorded in a model configuration."""
    recorded = getattr(config, "cappy", None) or {}
    if not isinstance(recorded, Mapping):
        raise FolderError(f"config.json: cappy must be an object, got {quote(json.dumps(recorded))}")
    return recorded


def _recorded_head(recorded: Mapping[str, JSON]) -> Head | None:
    return next((head for head in HEADS if head == recorded.get("head")), None)


def _warn_default_head(folder: Path, head: Head) -> Head:
    if head == "bce":
        remedy = "for raw scores, set sentence_transformers.activation_fn in its config.json"
        warn_once(
            folder, f"specifies no activation; a sigmoid is applied to the scores, as CrossEncoder does; {remedy}"
        )
    else:
        warn_once(
            folder,
            "specifies no activation; scores are raw, as in the published scorer; CrossEncoder would apply a sigmoid",
        )
    return head
