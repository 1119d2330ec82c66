"""Finetuning: adapts a scorer to one task's annotated instances; the LLM is not changed."""

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from cappy.config import settings
from cappy.errors import ConfigError
from cappy.progress import Progress, silent
from cappy.records import Manifest
from cappy.scorers import open_scorer
from cappy.training.settings import PAPER_TRUNCATION, TrainingSettings

if TYPE_CHECKING:
    from cappy.scoring import Scorer


@settings
class FinetuningConfig(TrainingSettings):
    """Settings of finetuning, which adapts a scorer to a task."""

    scorer: Annotated[
        str,
        Field(description="Scorer to start from: builtin, a folder, hub:org/name@revision or models:/name@champion"),
    ] = "builtin"


def run(config: FinetuningConfig, progress: Progress = silent) -> Manifest:
    """Finetunes `scorer` on the train split of `source` and writes the result to `target`.

    A killed run resumes from its last checkpoint when it is started again.
    """
    from cappy.scoring import training_prompts
    from cappy.training.train import train

    folder = open_scorer(config.scorer)
    return train(
        "finetuning",
        config,
        lambda: _load_scorer(config),
        parents=[folder.hash],
        seen_prompts=training_prompts(folder.path),
        start_folder=folder.path,
        progress=progress,
    )


def _load_scorer(config: FinetuningConfig) -> "Scorer":
    from cappy.scoring import Scorer

    scorer = Scorer.load(config.scorer, precision="fp32")
    if config.preset == "paper" and scorer.head != "mse":
        remedy = "start from a scorer pretrained with --head mse, or leave the preset out"
        raise ConfigError(f"--preset paper: needs head mse, but this scorer's head is {scorer.head}; {remedy}")
    if config.preset == "paper":
        scorer.encoder.truncation = PAPER_TRUNCATION
    return scorer
