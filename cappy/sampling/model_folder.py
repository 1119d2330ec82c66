"""A model in a folder that transformers saved: its configuration, the name of its weights, its end tokens."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from cappy.errors import ConfigError, FolderError, shown
from cappy.records.folder import sha256_of


def read_config(folder: Path) -> Any:
    """The configuration of a model folder; FolderError if there is none that transformers knows."""
    if not (folder / "config.json").is_file():
        raise FolderError(f"{folder}: no config.json there; a local generator is a folder that transformers saved")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise unloadable(folder, error) from error


def weights_hash(folder: Path) -> str:
    """Names the weights by their sha256; FolderError if there are no safetensors."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise FolderError(f"{folder}: holds no *.safetensors; save the model with safe_serialization=True")
    return "-".join(sha256_of(path)[:12] for path in weights)


def end_tokens(tokenizer: Any, config: Any, folder: Path) -> list[int]:
    """The tokens that end a response, the tokenizer's own first; ConfigError if neither names one."""
    own = getattr(config, "eos_token_id", None)
    told = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    ends = list(dict.fromkeys(end for end in told if end is not None and end < config.vocab_size))
    if not ends:
        raise ConfigError(f"{folder}: neither tokenizer nor config.json names an end token; set eos_token_id there")
    return ends


def unloadable(folder: Path, error: Exception) -> FolderError:
    """What to say where transformers raised `error` over a folder."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return FolderError(
        f"{folder}: transformers cannot load it ({shown(reason, 120)}); it must be a model with its tokenizer, without "
        "code of its own"
    )
