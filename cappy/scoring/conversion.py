"""A published PyTorch checkpoint as a scorer folder, once: pinned, read as tensors alone, every key accounted for."""

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedConfig
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from cappy.errors import ConfigError, FolderError, quote
from cappy.hub_client import hub_folder
from cappy.model_folder import check_size, open_model_folder
from cappy.records.folder import Manifest, describe_files, disk_errors, sha256_of, write_manifest
from cappy.scoring.folder import read_config, refuse_labels
from cappy.scoring.scorer import Scorer
from cappy.specs import CHECKPOINT, parse_spec

SHA256_DIGITS = 64
_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",), ("*.model",))
"""The files of a tokenizer, whole: without its merges, a vocabulary would tokenize byte by byte and say nothing."""
_COUNTED = ("embeddings.position_ids", "embeddings.token_type_ids")
"""Counting tensors that older versions of transformers wrote beside the weights; nothing is learned in them."""


def convert(source: str, target: Path, *, sha256: str) -> Manifest:
    """Writes the checkpoint of `source` (a folder or hub:org/name@revision) as a scorer folder, whole or not at all.

    `sha256` is that of its pytorch_model.bin. The head is the one its configuration states, `mse` where it states none.
    ConfigError or FolderError where the file is another one or no scorer: a key too many or missing, another shape.
    """
    if len(sha256) != SHA256_DIGITS or not set(sha256.lower()) <= set("0123456789abcdef"):
        raise ConfigError(f"--sha256: must be 64 hexadecimal digits, got {quote(sha256, 80)}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FolderError(f"{target}: exists already; choose another --target, or delete it first")
    folder = _folder(source)
    _check_hash(folder / CHECKPOINT, sha256.lower())
    set_verbosity_error()
    disable_progress_bar()
    scorer = _scorer(folder)
    facts = {"weights_sha256": sha256.lower(), "source": source if source.startswith("hub:") else "a folder"}
    return _publish(scorer, target, facts)


def _folder(source: str) -> Path:
    spec = parse_spec(source)
    if spec.kind == "hub":
        folder = hub_folder(spec, extra_patterns=(CHECKPOINT,))
    elif spec.kind == "path":
        folder = Path(spec.name)
    else:
        raise ConfigError(f"{quote(source)}: --source is a folder with a {CHECKPOINT}, or hub:org/name@revision")
    if not folder.is_dir():
        raise FolderError(f"{folder}: no such folder; --source is a folder or hub:org/name@revision")
    if not (folder / CHECKPOINT).is_file():
        other = "its safetensors need no conversion" if any(folder.glob("*.safetensors")) else "check the source"
        raise FolderError(f"{folder}: holds no {CHECKPOINT}; {other}")
    if not (folder / "config.json").is_file():
        raise FolderError(f"{folder}: holds no config.json, which says what the weights are; fetch it too")
    if not any(all(any(folder.glob(name)) for name in names) for names in _TOKENIZERS):
        files = ", or ".join(" with ".join(names) for names in _TOKENIZERS)
        raise FolderError(f"{folder}: holds no tokenizer ({files}); fetch its files too")
    return folder


def _check_hash(path: Path, expected: str) -> None:
    if (actual := sha256_of(path)) != expected:
        remedy = "give that one only if you trust where the file came from"
        raise FolderError(f"{path}: has sha256 {actual}, --sha256 says {expected}; {remedy}")


def _scorer(folder: Path) -> Scorer:
    opened = open_model_folder(folder, pinned=True, checkpoint=CHECKPOINT)
    config = opened.config()
    refuse_labels(folder, config)
    _check_architecture(folder, config)
    tensors = _tensors(folder / CHECKPOINT)
    elements = [tensor.numel() for tensor in tensors.values()]
    check_size(folder, AutoModelForSequenceClassification, config, elements)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32, trust_remote_code=False)
    tokenizer = opened.tokenizer()
    if tokenizer.pad_token_id is None or len(tokenizer) > config.vocab_size:
        sizes = f"{len(tokenizer)} tokens, padding {tokenizer.pad_token!r}; the encoder has {config.vocab_size}"
        raise FolderError(f"{folder}: its tokenizer is not this encoder's ({sizes}); fetch the one it was trained with")
    model.load_state_dict(_weights(folder / CHECKPOINT, tensors, model.state_dict()))
    return Scorer(model.eval(), tokenizer, read_config(opened, config, tokenizer, model, unstated="mse"))


def _check_architecture(folder: Path, config: PreTrainedConfig) -> None:
    for name in config.architectures or ():
        if not name.endswith("ForSequenceClassification"):
            remedy = "its scoring head would be made anew, so train a scorer from it instead: cappy pretraining"
            raise FolderError(f"{folder}: is a {name}, a scorer is a ...ForSequenceClassification; {remedy}")


def _weights(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors in fp32, once names and shapes are those that the model expects."""
    learned = {name: tensor for name, tensor in tensors.items() if not name.endswith(_COUNTED)}
    if missing := expected.keys() - learned.keys():
        raise FolderError(f"{path}: lacks {_some(missing)}; made up weights score nothing, get the whole checkpoint")
    if unexpected := learned.keys() - expected.keys():
        raise FolderError(f"{path}: has {_some(unexpected)}, which its config.json knows nothing of; get the right one")
    for name, tensor in learned.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, by its config.json {tuple(expected[name].shape)}"
            raise FolderError(f"{path}: {name} has shape {shapes}; get the config.json of this checkpoint")
    return {name: tensor.to(expected[name].dtype) for name, tensor in learned.items()}


def _tensors(path: Path) -> dict[str, Tensor]:
    """The state dict of a file; FolderError where it is anything else. No code of the file runs."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise FolderError(
            f"{path}: is not a checkpoint of tensors alone; nothing else is read, get another file"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise FolderError(f"{path}: is not a state dict (names with a tensor each), got {quote(type(state).__name__)}")
    return dict(state)


def _some(names: Iterable[str], limit: int = 3) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more keys" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more


def _publish(scorer: Scorer, target: Path, facts: Mapping[str, str]) -> Manifest:
    """The folder under its final name, its manifest in it, by one rename."""
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            work = temporary / "scorer"
            scorer.write(work)
            manifest = Manifest(step="conversion", files=describe_files(work), facts=facts)
            write_manifest(work, manifest)
            work.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return manifest
