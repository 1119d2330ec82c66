"""From a folder of annotated instances to a scorer folder: what pretraining and finetuning share."""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cappy.config import fingerprint, identity
from cappy.errors import ConfigError
from cappy.progress import Progress, silent
from cappy.records import Manifest, read_manifest
from cappy.records.folder import describe_files
from cappy.records.work import claim, finish
from cappy.scoring import TRAINED_ON
from cappy.scoring.scorer import Scorer
from cappy.scoring.training_data import write_training_data
from cappy.steps import step_version
from cappy.training.checks import decides
from cappy.training.corpus import Corpora, open_corpora
from cappy.training.deepspeed import name_accelerator
from cappy.training.distributed import Ranks, join_ranks
from cappy.training.launch import spread, starts_ranks
from cappy.training.loop import Outcome, fit, trial
from cappy.training.meter import write_log, write_speed
from cappy.training.remote.run import train_elsewhere
from cappy.training.settings import TrainingSettings

LOGGER = logging.getLogger(__name__)
Start = Callable[[], Scorer]


def train(
    step: str,
    config: TrainingSettings,
    start: Start,
    *,
    parents: Sequence[str],
    seen: NDArray[np.uint64],
    start_folder: Path | None = None,
    progress: Progress,
) -> Manifest:
    """Trains what `start` gives on the train split, stops by the validation split, publishes the scorer folder.

    The manifest's facts say what decided which weights are kept (`_facts`).

    `seen` are the prompt hashes that the starting scorer in `start_folder` was trained on; the folder records them with
    this run's own, and groups and rows likewise (`cappy.scoring.training_data`).
    Starts the ranks that the settings ask for, unless this process is one of them; the first rank alone writes. Where
    the settings name a platform, a job of it does all that.
    """
    if config.launcher != "here":
        return train_elsewhere(
            step, config, _result_settings(config), (read_manifest(config.source).hash, *parents), progress
        )
    if starts_ranks(config):
        return spread(step, config, progress)
    name_accelerator()
    hashes = (read_manifest(config.source).hash, *parents)
    with join_ranks() as ranks:
        if config.dry_run:
            scorer, corpora = _begin(config, start, progress)
            reported = progress if ranks.first else silent
            metrics = trial(scorer, corpora, config, ranks, reported)
            version = step_version(step)
            return Manifest(step=step, files=(), config=identity(config), step_version=version, metrics=metrics)
        if not ranks.first:
            _fit(config, start, Path(), silent, ranks)
            return Manifest.from_json(ranks.broadcast_object(None))
        computed = _result_settings(config)
        with claim(config.work, step, computed, hashes, fresh=config.fresh) as folder:
            scorer, corpora, outcome = _fit(config, start, folder / ".checkpoints", progress, ranks)
            scorer.write(folder)
            _write_facts(folder, corpora, seen, outcome)
            write_training_data(folder, config.source, start_folder)
            manifest = Manifest(
                step=step,
                files=describe_files(folder),
                config=computed,
                step_version=step_version(step),
                seed=config.seed,
                generators=read_manifest(config.source).generators,
                parents=hashes,
                metrics=_metrics(outcome, corpora),
                facts=_facts(config, outcome, corpora),
            )
            finish(folder, config.target, manifest)
            write_speed(config.work, manifest.hash, outcome.curve)
            ranks.broadcast_object(manifest.to_json())
            return manifest


def _result_settings(config: TrainingSettings) -> dict[str, object]:
    """The settings that change what is computed: `jax` is one, whose floats are not rounded as torch's are."""
    return identity(config) | ({"parallelism": "jax"} if config.parallelism == "jax" else {})


def _fit(
    config: TrainingSettings, start: Start, checkpoints: Path, progress: Progress, ranks: Ranks
) -> tuple[Scorer, Corpora, Outcome]:
    scorer, corpora = _begin(config, start, progress)
    if ranks.first and (cut := _count_cut_pairs(corpora)):
        pairs = corpora.train.facts.pairs + corpora.validation.facts.pairs
        LOGGER.warning("%s of %s pairs are longer than %d tokens: cut", cut, pairs, scorer.encoder.max_length)
    return scorer, corpora, fit(scorer, corpora, config, checkpoints, ranks, progress)


def _begin(config: TrainingSettings, start: Start, progress: Progress) -> tuple[Scorer, Corpora]:
    scorer = start()
    corpora = open_corpora(
        config.source,
        config.work / "tokens",
        scorer.tokenizer,
        scorer.encoder,
        metric=config.metric,
        sources=config.sources,
        unit=config.unit,
        progress=progress,
    )
    if not corpora.has_train:
        of = f" with a response of source {', '.join(config.sources)}" if config.sources else ""
        raise ConfigError(f"{config.source}: has no instance of split train{of}; nothing to learn from")
    return scorer, corpora


def _write_facts(folder: Path, corpora: Corpora, seen: NDArray[np.uint64], outcome: Outcome) -> None:
    np.union1d(seen, corpora.prompts).astype("<u8").tofile(folder / TRAINED_ON)
    write_log(folder, outcome.log, outcome.curve, outcome.events)


def _facts(config: TrainingSettings, outcome: Outcome, corpora: Corpora) -> dict[str, object]:
    """What decided which weights the scorer has.

    `stopped_on` is the split whose instances chose the weights and could stop training, "" where none did;
    `stopped_on_hash` stands for their ids (`instances_hash`), `stopped_on_instances` for their number. `kept` is the
    scorer's `start`, an `earlier` check or the `last` weights, and `kept_because` a sentence for the former two.
    """
    validation = corpora.validation
    kept = "last" if outcome.best_update == outcome.updates else "earlier" if outcome.best_update else "start"
    facts: dict[str, object] = {"kept": kept, "kept_because": outcome.reason, "stopped_on": ""}
    if decides(config, validation):
        ids = [validation.name(index) for index in range(len(validation))]
        facts |= {"stopped_on": "validation", "stopped_on_hash": instances_hash(ids), "stopped_on_instances": len(ids)}
    return facts


def instances_hash(ids: Iterable[str]) -> str:
    """One hash for a set of instances by their ids, in whatever order."""
    return fingerprint(sorted(set(ids)))


def _metrics(outcome: Outcome, corpora: Corpora) -> dict[str, float]:
    metrics: dict[str, float] = {
        "updates": outcome.updates,
        "best_update": outcome.best_update,
        "instances": corpora.instances,
        "cut_pairs": _count_cut_pairs(corpora),
    }
    if len(corpora.validation):
        metrics["validation_pick"] = outcome.best_pick
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def _count_cut_pairs(corpora: Corpora) -> int:
    return corpora.train.cut_pairs + corpora.validation.cut_pairs
