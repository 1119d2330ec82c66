"""What the CrossEncoder of sentence-transformers reads of a folder beside weights and tokenizer.

Places and order are those of its version 6.2, which reads what versions 2 to 5 wrote too. What it would apply and we do
not is refused, so that one folder gives one number.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cappy.errors import FolderError, shown

LOGGER = logging.getLogger(__name__)
Head = Literal["mse", "bce"]

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
TRANSFORMER_FAMILIES = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
TRANSFORMER_FILES = tuple(f"sentence_{family}_config.json" for family in TRANSFORMER_FAMILIES)
"""The first of these that is there says how the folder's Transformer module reads texts."""
CHAT_TEMPLATE = "chat_template.jinja"
FILES = (MODULES, SETTINGS, *TRANSFORMER_FILES, CHAT_TEMPLATE)
"""Files that change the CrossEncoder's number; a folder that we write has none of them."""

ACTIVATIONS: Mapping[Head, str] = {
    "mse": "torch.nn.modules.linear.Identity",
    "bce": "torch.nn.modules.activation.Sigmoid",
}
"""The activation of each head, as sentence-transformers writes it."""
_HEADS: Mapping[str, Head] = {"Identity": "mse", "Sigmoid": "bce"}
_OLD_KEY = "sbert_ce_default_activation_function"
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
class Stated:
    """What a folder states: its head, None where it states no activation, and the tokens of a pair, None likewise.

    `renders` says whether pairs would be written into the tokenizer's chat template, if it has one.
    """

    head: Head | None
    max_length: int | None = None
    renders: bool = True


def read_stated(folder: Path, config: Any) -> Stated:
    """What the folder with this configuration states; FolderError for modules, prompts and activations unknown here."""
    settings = _object(folder / SETTINGS)
    if not (folder / MODULES).is_file() or settings.get("model_type", "SentenceTransformer") != "CrossEncoder":
        return Stated(head=_head_of_config(folder, config))
    _check_modules(folder / MODULES)
    _check_prompt(folder / SETTINGS, settings)
    transformer = next((path for name in TRANSFORMER_FILES if (path := folder / name).is_file()), None)
    values = _object(transformer) if transformer else {}
    if transformer:
        _check_transformer(transformer, values)
    head = _head(settings.get("activation_fn"), f"{folder / SETTINGS}: activation_fn")
    return Stated(
        head=head or _head_of_config(folder, config),
        max_length=values.get("max_seq_length"),
        renders="message" in (values.get("modality_config") or {}),
    )


def check_template(folder: Path, template: Any) -> None:
    """FolderError where a chat template would write pairs; where it cannot, a warning: it is not applied here."""
    if not template:
        return
    if all(role in json.dumps(template) for role in ("query", "document")):
        remedy = f"delete it ({CHAT_TEMPLATE}, or its entry in tokenizer_config.json) if the scorer was trained without"
        raise FolderError(
            f"{folder}: has a chat template for pairs (query, document), which is not applied here; {remedy}"
        )
    warn_once(folder, "has a chat template; pairs are encoded without it, as transformers does")


def warn_once(folder: Path, text: str) -> None:
    """Logs a warning about a folder, once per process."""
    if (folder, text) not in _WARNED:
        _WARNED.add((folder, text))
        LOGGER.warning("%s: %s", folder, text)


def _head_of_config(folder: Path, config: Any) -> Head | None:
    where, stated = folder / "config.json", getattr(config, "sentence_transformers", None)
    if stated is not None and not isinstance(stated, Mapping):
        raise FolderError(f"{where}: sentence_transformers must be an object, got {shown(json.dumps(stated))}")
    if stated is not None and "activation_fn" in stated:
        return _head(stated["activation_fn"], f"{where}: sentence_transformers.activation_fn")
    return _head(getattr(config, _OLD_KEY, None), f"{where}: {_OLD_KEY}")


def _head(path: Any, where: str) -> Head | None:
    if path is None:
        return None
    head = _HEADS.get(path.rpartition(".")[2]) if isinstance(path, str) and path.startswith("torch.nn.") else None
    if head is None:
        known = " or ".join(ACTIVATIONS.values())
        raise FolderError(f"{where}: is {shown(json.dumps(path), 80)}, which is not applied here; it must be {known}")
    return head


def _check_modules(path: Path) -> None:
    modules = _json(path)
    known = isinstance(modules, Sequence) and all(isinstance(module, Mapping) for module in modules)
    names = [str(module.get("type", "")).rpartition(".")[2] for module in modules] if known else []
    if names != ["Transformer"] or modules[0].get("path"):
        found = shown(", ".join(names), 80)
        raise FolderError(f"{path}: names the modules {found}; a scorer is one Transformer in the folder itself")


def _check_prompt(path: Path, settings: Mapping[str, Any]) -> None:
    name = settings.get("default_prompt_name")
    prompts = settings.get("prompts") or {}
    if name is None or (isinstance(prompts, Mapping) and prompts.get(name) == ""):
        return
    remedy = "set it to null and give instructions that begin with the prompt"
    raise FolderError(f"{path}: default_prompt_name {shown(str(name))} is not applied here; {remedy}")


def _check_transformer(path: Path, values: Mapping[str, Any]) -> None:
    if (task := values.get("transformer_task", "sequence-classification")) != "sequence-classification":
        raise FolderError(
            f"{path}: transformer_task is {shown(json.dumps(task))}; a scorer's is sequence-classification"
        )
    for name in values.keys() - _WITHOUT_EFFECT - {"transformer_task", "max_seq_length"}:
        if name not in _UNSUPPORTED:
            raise FolderError(f"{path}: {shown(name)} is unknown here; remove it if it does not change scores")
        if values[name]:
            raise FolderError(
                f"{path}: {name} {_UNSUPPORTED[name]}, which is not done here; save the scorer without it"
            )
    length = values.get("max_seq_length")
    if length is not None and (not isinstance(length, int) or isinstance(length, bool)):
        raise FolderError(f"{path}: max_seq_length must be a number of tokens, got {shown(json.dumps(length))}")


def _object(path: Path) -> Mapping[str, Any]:
    values = _json(path) if path.is_file() else {}
    if not isinstance(values, Mapping):
        raise FolderError(f"{path}: must be an object, got {shown(json.dumps(values), 40)}; get the folder again")
    return values


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise FolderError(f"{path}: is not JSON ({shown(str(error), 80)}); get the folder again") from error
