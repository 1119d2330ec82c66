"""From a folder of annotated instances to a scorer folder: what pretraining and finetuning share."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cappy.config import code_version, identity
from cappy.errors import ConfigError
from cappy.progress import Progress
from cappy.records import Instance, Manifest, read, read_manifest
from cappy.records.folder import describe_files
from cappy.records.work import claim, finish
from cappy.scoring import TRAINED_ON
from cappy.scoring.scorer import Scorer
from cappy.training.feed import prompt_hashes, to_group
from cappy.training.loop import Outcome, fit
from cappy.training.plan import TrainingSettings


def train(
    step: str,
    config: TrainingSettings,
    start: Callable[[], Scorer],
    *,
    parents: Sequence[str],
    seen: NDArray[np.uint64],
    progress: Progress,
) -> Manifest:
    """Trains what `start` gives on the train split, stops by the validation split, publishes the scorer folder.

    `seen` are the prompt hashes that the starting scorer was trained on; the folder records them with this run's own.
    """
    source = read_manifest(config.source)
    with claim(config.work, step, identity(config), [source.hash, *parents]) as folder:
        instances = list(read(config.source, splits=("train", "validation")))
        train, validation = (
            [to_group(instance, config.metric, sources) for instance in instances if instance.split == split]
            for split, sources in (("train", config.sources), ("validation", ()))
        )
        train = [group for group in train if group.responses]
        if not train:
            of = f" with a response of source {', '.join(config.sources)}" if config.sources else ""
            raise ConfigError(f"{config.source}: has no instance of split train{of}; nothing to learn from")
        scorer = start()
        outcome = fit(
            scorer,
            train,
            validation,
            config,
            checkpoints=folder / ".checkpoints",
            progress=progress,
        )
        scorer.write(folder)
        _write_facts(folder, instances, seen, outcome)
        manifest = Manifest(
            step=step,
            files=describe_files(folder),
            config=identity(config),
            code=code_version(),
            seed=config.seed,
            generators=source.generators,
            parents=(source.hash, *parents),
            metrics=_metrics(outcome, instances),
        )
        return finish(folder, config.target, manifest)


def _write_facts(folder: Path, instances: Sequence[Instance], seen: NDArray[np.uint64], outcome: Outcome) -> None:
    np.union1d(seen, prompt_hashes(instances)).astype("<u8").tofile(folder / TRAINED_ON)
    (folder / "training.json").write_text(json.dumps(outcome.log, indent=1) + "\n")


def _metrics(outcome: Outcome, instances: Sequence[Instance]) -> dict[str, float]:
    metrics = {
        "updates": outcome.updates,
        "best_update": outcome.best_update,
        "validation_pick": outcome.best_pick,
        "instances": len(instances),
    }
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
