"""Converts a published PyTorch checkpoint to a scorer folder: verifies its sha256, reads only tensors, checks keys."""

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
from cappy.scoring.folder import check_single_label, read_config
from cappy.scoring.scorer import Scorer
from cappy.specs import CHECKPOINT, parse_spec

SHA256_DIGITS = 64
_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",), ("*.model",))
"""The files of complete tokenizers: without its merges, a vocabulary would silently tokenize byte by byte."""
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
"""Buffers that older versions of transformers stored with the weights; they are not learned."""


def convert(source: str, target: Path, *, sha256: str) -> Manifest:
    """Writes the checkpoint of `source` (a folder or hub:org/name@revision) as a scorer folder, atomically.

    `sha256` is the hash of its pytorch_model.bin. The head is read from its configuration, and is `mse` by default.
    Raises ConfigError or FolderError if the file has another hash, or is not a scorer (unexpected or missing keys,
    wrong shapes).
    """
    if len(sha256) != SHA256_DIGITS or not set(sha256.lower()) <= set("0123456789abcdef"):
        raise ConfigError(f"--sha256: must be 64 hexadecimal digits, got {quote(sha256, 80)}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FolderError(f"{target}: already exists; choose another --target, or delete it first")
    folder = _find_folder(source)
    _check_hash(folder / CHECKPOINT, sha256.lower())
    set_verbosity_error()
    disable_progress_bar()
    scorer = _load_scorer(folder)
    facts = {"weights_sha256": sha256.lower(), "source": source if source.startswith("hub:") else "a folder"}
    return _publish(scorer, target, facts)


def _find_folder(source: str) -> Path:
    spec = parse_spec(source)
    if spec.kind == "hub":
        folder = hub_folder(spec, extra_patterns=(CHECKPOINT,))
    elif spec.kind == "path":
        folder = Path(spec.name)
    else:
        raise ConfigError(f"--source: must be a folder with {CHECKPOINT} or hub:org/name@revision, got {quote(source)}")
    if not folder.is_dir():
        raise FolderError(f"{folder}: no such folder; --source is a folder or hub:org/name@revision")
    if not (folder / CHECKPOINT).is_file():
        remedy = "its safetensors need no conversion" if any(folder.glob("*.safetensors")) else "check --source"
        raise FolderError(f"{folder}: has no {CHECKPOINT}; {remedy}")
    if not (folder / "config.json").is_file():
        raise FolderError(f"{folder}: has no config.json, which describes the weights; download it too")
    if not any(all(any(folder.glob(name)) for name in names) for names in _TOKENIZERS):
        files = ", or ".join(" with ".join(names) for names in _TOKENIZERS)
        raise FolderError(f"{folder}: has no tokenizer ({files}); download its files too")
    return folder


def _check_hash(path: Path, expected: str) -> None:
    if (actual := sha256_of(path)) != expected:
        remedy = "change --sha256 only if you trust the origin of the file"
        raise FolderError(f"{path}: has sha256 {actual}, expected {expected} (--sha256); {remedy}")


def _load_scorer(folder: Path) -> Scorer:
    opened = open_model_folder(folder, pinned=True, checkpoint=CHECKPOINT)
    config = opened.config()
    check_single_label(folder, config)
    _check_architecture(folder, config)
    tensors = _load_tensors(folder / CHECKPOINT)
    elements = [tensor.numel() for tensor in tensors.values()]
    check_size(folder, AutoModelForSequenceClassification, config, elements)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32, trust_remote_code=False)
    tokenizer = opened.tokenizer()
    if tokenizer.pad_token_id is None or len(tokenizer) > config.vocab_size:
        sizes = f"{len(tokenizer)} tokens, padding {tokenizer.pad_token!r}; the encoder has {config.vocab_size}"
        raise FolderError(
            f"{folder}: its tokenizer does not fit the encoder ({sizes}); use the one it was trained with"
        )
    model.load_state_dict(_check_weights(folder / CHECKPOINT, tensors, model.state_dict()))
    return Scorer(model.eval(), tokenizer, read_config(opened, config, tokenizer, model, default_head="mse"))


def _check_architecture(folder: Path, config: PreTrainedConfig) -> None:
    for name in config.architectures or ():
        if not name.endswith("ForSequenceClassification"):
            remedy = "its scoring head would be random; train a scorer from it instead (cappy pretraining)"
            raise FolderError(f"{folder}: is a {name}, expected a ...ForSequenceClassification; {remedy}")


def _check_weights(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors in fp32. Raises FolderError if names or shapes differ from those of the model."""
    parameters = {name: tensor for name, tensor in tensors.items() if not name.endswith(_BUFFERS)}
    if missing := expected.keys() - parameters.keys():
        raise FolderError(f"{path}: lacks {_list_names(missing)}; download the complete checkpoint")
    if unexpected := parameters.keys() - expected.keys():
        raise FolderError(
            f"{path}: has {_list_names(unexpected)}, which do not match its config.json; download matching files"
        )
    for name, tensor in parameters.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, expected {tuple(expected[name].shape)} by config.json"
            raise FolderError(f"{path}: {name} has shape {shapes}; download the config.json of this checkpoint")
    return {name: tensor.to(expected[name].dtype) for name, tensor in parameters.items()}


def _load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads the state dict in a file without running code. Raises FolderError if it has anything but tensors."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise FolderError(
            f"{path}: is not a checkpoint of tensors only, so it is not loaded; use another file"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise FolderError(f"{path}: expected a state dict (name -> tensor), got {quote(type(state).__name__)}")
    return dict(state)


def _list_names(names: Iterable[str], limit: int = 3) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more keys" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more


def _publish(scorer: Scorer, target: Path, facts: Mapping[str, str]) -> Manifest:
    """Writes the scorer with its manifest to a temporary folder, and renames it to `target`."""
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
