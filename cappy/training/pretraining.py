"""Pretraining: trains a scorer from an encoder, on the annotated instances of many tasks."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from cappy.config import ADVANCED, settings
from cappy.errors import ConfigError, FolderError, quote
from cappy.hub_client import hub_folder
from cappy.model_folder import ModelFolder, open_model_folder
from cappy.progress import Progress, silent
from cappy.records import Manifest
from cappy.specs import parse_spec
from cappy.training.settings import PAPER_TRUNCATION, TrainingSettings

if TYPE_CHECKING:
    from cappy.scoring import Scorer

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")


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
        int, Field(ge=16, description="Maximum tokens of a pair; a longer instruction is cut in the middle")
    ] = 512
    layers: Annotated[int, ADVANCED, Field(ge=1, description="Layers of the built-in encoder")] = 4
    hidden_size: Annotated[
        int, ADVANCED, Field(ge=32, multiple_of=32, description="Width of the built-in encoder, a multiple of 32")
    ] = 160


def run(config: PretrainingConfig, progress: Progress = silent) -> Manifest:
    """Pretrains a scorer on the train split of `source` into `target`; a killed run continues at its checkpoint."""
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
    """The folder of the encoder; for `builtin` the built-in LLM's, whose tokenizer the new encoder shares."""
    spec = parse_spec(encoder)
    if spec.kind == "builtin":
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
    from transformers import AutoModelForSequenceClassification
    from transformers.utils.logging import set_verbosity_error

    from cappy.scoring import Scorer
    from cappy.scoring.config import ScorerConfig
    from cappy.scoring.folder import max_positions, use_token_types, warn_once

    _refuse_without_tokenizer(folder.path)
    torch.manual_seed(config.seed)
    if config.encoder == "builtin":
        from cappy.builtin.scorer import new_encoder

        model, tokenizer = new_encoder(config.layers, config.hidden_size, config.max_length)
    else:
        # Without this transformers warns that the head's weights are newly initialized, which is intended here.
        set_verbosity_error()
        tokenizer, encoder_config = folder.tokenizer(), folder.config()
        encoder_config.num_labels = 1
        model, _ = folder.model(AutoModelForSequenceClassification, encoder_config)
        use_token_types(tokenizer, encoder_config)
    max_length = min(config.max_length, max_positions(model) or config.max_length)
    if max_length < config.max_length:
        warn_once(
            folder.path, f"has {max_length} positions, so pairs are cut to {max_length} tokens, not {config.max_length}"
        )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    truncation = PAPER_TRUNCATION if config.preset == "paper" else "middle"
    return Scorer(model, tokenizer, ScorerConfig(head=config.head, max_length=max_length, truncation=truncation))


def _refuse_without_tokenizer(folder: Path) -> None:
    """Raises FolderError if an encoder's folder has no tokenizer: transformers would make an empty one."""
    if not any(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)):
        remedy = "save the tokenizer beside the weights (tokenizer.save_pretrained)"
        raise FolderError(f"{folder}: has no tokenizer ({TOKENIZER_FILES[0]} or a vocabulary); {remedy}")
