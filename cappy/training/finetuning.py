"""Finetuning: adapts a scorer to one task's annotated instances; the LLM is not changed."""

import logging
import os
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from cappy.config import settings
from cappy.errors import ConfigError
from cappy.progress import Progress, silent
from cappy.records import Manifest
from cappy.scorers import open_scorer
from cappy.training.settings import PAPER_TRUNCATION, TrainingSettings

if TYPE_CHECKING:
    from cappy.model_folder import ModelFolder
    from cappy.scoring import Scorer
    from cappy.scoring.config import Head

LOGGER = logging.getLogger(__name__)


@settings
class FinetuningConfig(TrainingSettings):
    """Settings of finetuning, which adapts a scorer to a task."""

    scorer: Annotated[
        str,
        Field(
            description="Scorer or encoder to start from: builtin, a folder, hub:org/name@revision or "
            "models:/name@champion; an encoder gets a new head"
        ),
    ] = "builtin"


def run(config: FinetuningConfig, progress: Progress = silent) -> Manifest:
    """Finetunes `scorer` on the train split of `source` and writes the result to `target`.

    An encoder is given a new head (`bce`, or `mse` with the preset `paper`), which the manifest's facts name as
    `new_head`. A killed run resumes from its last checkpoint when it is started again.
    """
    from cappy.scoring import training_prompts
    from cappy.scoring.model import is_encoder
    from cappy.training.train import train

    folder = open_scorer(config.scorer)
    new_head = is_encoder(folder, folder.config())
    return train(
        "finetuning",
        config,
        lambda: _make_scorer(config, folder) if new_head else _load_scorer(config),
        parents=[folder.hash],
        seen_prompts=training_prompts(folder.path),
        start_folder=folder.path,
        facts={"new_head": _new_head(config)} if new_head else {},
        progress=progress,
    )


def _new_head(config: FinetuningConfig) -> "Head":
    return "mse" if config.preset == "paper" else "bce"


def _make_scorer(config: FinetuningConfig, folder: "ModelFolder") -> "Scorer":
    """A scorer of an encoder, as pretraining makes it at its defaults."""
    import torch

    from cappy.scoring import Scorer
    from cappy.scoring.folder import DEFAULT_MAX_LENGTH
    from cappy.scoring.model import describe_modules

    unused = f"; its modules {modules} are not used" if (modules := describe_modules(folder.path)) else ""
    if os.environ.get("RANK", "0") == "0":  # One of several ranks says it for all.
        LOGGER.warning("%s is an encoder: a new head is made%s", folder.path, unused)
    torch.manual_seed(config.seed)
    truncation = PAPER_TRUNCATION if config.preset == "paper" else "middle"
    return Scorer.from_encoder(folder, head=_new_head(config), max_length=DEFAULT_MAX_LENGTH, truncation=truncation)


def _load_scorer(config: FinetuningConfig) -> "Scorer":
    from cappy.scoring import Scorer

    scorer = Scorer.load(config.scorer, precision="fp32")
    if config.preset == "paper" and scorer.head != "mse":
        remedy = "start from a scorer pretrained with --head mse, or leave the preset out"
        raise ConfigError(f"--preset paper: needs head mse, but this scorer's head is {scorer.head}; {remedy}")
    if config.preset == "paper":
        scorer.encoder.truncation = PAPER_TRUNCATION
    return scorer
