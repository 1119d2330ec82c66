"""Pretraining: an encoder becomes a scorer, on the annotated instances of many tasks."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from cappy.config import settings
from cappy.progress import Progress, silent
from cappy.records import Manifest
from cappy.training.plan import TrainingSettings

if TYPE_CHECKING:
    from cappy.scoring import Scorer


@settings
class PretrainingConfig(TrainingSettings):
    """A scorer, from an encoder."""

    encoder: Annotated[
        str,
        Field(description="Encoder to start from: builtin (a very small new one), a folder, hub:org/name@revision"),
    ] = "builtin"
    head: Annotated[
        Literal["bce", "mse"], Field(description="bce: sigmoid over soft labels, 0 to 1; mse: the published regression")
    ] = "bce"
    max_length: Annotated[int, Field(ge=16, description="Tokens of a pair; a longer instruction is cut inside")] = 512
    layers: Annotated[int, Field(ge=1, description="Layers of the built-in encoder")] = 4
    hidden_size: Annotated[
        int, Field(ge=32, multiple_of=32, description="Width of the built-in encoder, a multiple of 32")
    ] = 160


def run(config: PretrainingConfig, progress: Progress = silent) -> Manifest:
    """Pretrains a scorer on the train split of `source` into `target`; a killed run continues at its checkpoint."""
    import numpy as np

    from cappy.records.folder import describe_files
    from cappy.training.paper import resolved
    from cappy.training.train import train

    config = resolved(config)
    folder = _encoder_folder(config.encoder)
    return train(
        "pretraining",
        config,
        lambda: _start(config, folder),
        parents=[
            file.sha256 for file in describe_files(folder) if file.name.endswith((".safetensors", "tokenizer.json"))
        ],
        seen=np.empty(0, dtype="<u8"),
        progress=progress,
    )


def _encoder_folder(text: str) -> Path:
    """The folder of the encoder; for `builtin` the built-in LLM's, whose tokenizer the new encoder shares."""
    from cappy.errors import ConfigError, shown
    from cappy.specs import hub_folder, parse_spec

    spec = parse_spec(text)
    if spec.kind == "builtin":
        from cappy.builtin import LLM_FOLDER

        return LLM_FOLDER
    if spec.kind == "hub":
        return hub_folder(spec)
    if spec.kind != "path" or not (Path(spec.name) / "config.json").is_file():
        raise ConfigError(
            f"{shown(text)}: is no encoder; name builtin, a folder with config.json, or hub:org/name@revision"
        )
    return Path(spec.name)


def _start(config: PretrainingConfig, folder: Path) -> "Scorer":
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils.logging import set_verbosity_error

    from cappy.scoring import Scorer
    from cappy.scoring.scorer import refuse_pickles
    from cappy.training.guards import refuse_without_tokenizer
    from cappy.training.paper import TRUNCATION

    refuse_pickles(folder)
    refuse_without_tokenizer(folder)
    torch.manual_seed(config.seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if config.encoder == "builtin":
        from cappy.builtin.scorer import new_encoder

        model, tokenizer = new_encoder(config.layers, config.hidden_size, config.max_length)
    else:
        # It would report that the head's weights are new, which is the point of pretraining.
        set_verbosity_error()
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, dtype=torch.float32, use_safetensors=True
        )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    truncation = TRUNCATION if config.preset == "paper" else "middle"
    return Scorer(model, tokenizer, head=config.head, max_length=config.max_length, truncation=truncation)
