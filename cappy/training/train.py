"""Trains a scorer from a folder of annotated instances and writes the scorer folder, for pretraining and finetuning."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from cappy.config import fingerprint, result_settings
from cappy.errors import ConfigError
from cappy.progress import Progress, silent
from cappy.records import Manifest, read_manifest
from cappy.records.folder import describe_files
from cappy.records.work import claim, finish
from cappy.scoring import TRAINED_ON
from cappy.scoring.scorer import Scorer
from cappy.scoring.training_data import write_training_data
from cappy.steps import step_version
from cappy.training.checks import stops_early
from cappy.training.corpus import Corpora, open_corpora
from cappy.training.deepspeed import set_accelerator
from cappy.training.distributed import World, join_ranks
from cappy.training.launch import launch_ranks, must_launch
from cappy.training.loop import TrainingOutcome, fit, run_trial
from cappy.training.meter import write_log, write_speed
from cappy.training.remote.run import train_remotely
from cappy.training.settings import TrainingSettings

LOGGER = logging.getLogger(__name__)
MakeScorer = Callable[[], Scorer]


def train(
    step: str,
    config: TrainingSettings,
    make_scorer: MakeScorer,
    *,
    parents: Sequence[str],
    seen_prompts: NDArray[np.uint64],
    start_folder: Path | None = None,
    facts: Mapping[str, object] = MappingProxyType({}),
    progress: Progress,
) -> Manifest:
    """Trains the scorer of `make_scorer` on the train split, with early stopping on validation; publishes the folder.

    Returns its manifest, whose facts are `facts` and how the weights were chosen (`_build_facts`). With
    `config.dry_run`, writes nothing and returns a manifest with the metrics of `run_trial`.

    `seen_prompts` are the prompt hashes that the starting scorer in `start_folder` was trained on. The folder records
    them together with those of this run; likewise for groups and rows (`cappy.scoring.training_data`).

    Launches the ranks that the settings request, unless this process is one of them; only the first rank writes. If
    `config.launcher` is a platform, all this runs in a job there. Raises ConfigError if the settings or the data cannot
    be used for training, and TrainingError if training fails or is stopped.
    """
    if config.launcher != "here":
        return train_remotely(
            step, config, _key_settings(config), (read_manifest(config.source).hash, *parents), progress
        )
    if must_launch(config):
        return launch_ranks(step, config, progress)
    set_accelerator()
    hashes = (read_manifest(config.source).hash, *parents)
    with join_ranks() as world:
        if config.dry_run:
            scorer, corpora = _open_inputs(config, make_scorer, progress)
            rank_progress = progress if world.first else silent
            metrics = run_trial(scorer, corpora, config, world, rank_progress)
            version = step_version(step)
            return Manifest(step=step, files=(), config=result_settings(config), step_version=version, metrics=metrics)
        if not world.first:
            _fit(config, make_scorer, Path(), silent, world)
            return Manifest.from_json(world.broadcast_object(None))
        key_settings = _key_settings(config)
        with claim(config.work, step, key_settings, hashes, fresh=config.fresh) as folder:
            scorer, corpora, outcome = _fit(config, make_scorer, folder / ".checkpoints", progress, world)
            scorer.write(folder)
            _write_records(folder, corpora, seen_prompts, outcome)
            write_training_data(folder, config.source, start_folder)
            manifest = Manifest(
                step=step,
                files=describe_files(folder),
                config=key_settings,
                step_version=step_version(step),
                seed=config.seed,
                generators=read_manifest(config.source).generators,
                parents=hashes,
                metrics=_build_metrics(outcome, corpora),
                facts={**facts, **_build_facts(config, outcome, corpora)},
            )
            finish(folder, config.target, manifest)
            write_speed(config.work, manifest.hash, outcome.curve)
            world.broadcast_object(manifest.to_json())
            return manifest


def _key_settings(config: TrainingSettings) -> dict[str, object]:
    """The settings in the key of the work: those that determine the result, and `jax`, which rounds differently."""
    return result_settings(config) | ({"parallelism": "jax"} if config.parallelism == "jax" else {})


def _fit(
    config: TrainingSettings, make_scorer: MakeScorer, checkpoints: Path, progress: Progress, world: World
) -> tuple[Scorer, Corpora, TrainingOutcome]:
    scorer, corpora = _open_inputs(config, make_scorer, progress)
    if world.first and (count := _count_truncated_pairs(corpora)):
        pairs = corpora.train.facts.pairs + corpora.validation.facts.pairs
        text = "%s of %s pairs are longer than %d tokens and were truncated"
        LOGGER.warning(text, count, pairs, scorer.encoder.max_length)
    return scorer, corpora, fit(scorer, corpora, config, checkpoints, world, progress)


def _open_inputs(config: TrainingSettings, make_scorer: MakeScorer, progress: Progress) -> tuple[Scorer, Corpora]:
    scorer = make_scorer()
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
        sources_text, remedy = "", "give a folder that has some"
        if config.sources:
            sources_text = f" with a response of source {', '.join(config.sources)}"
            remedy = f"{remedy}, or other --sources"
        raise ConfigError(f"{config.source}: has no instance of split train{sources_text}; {remedy}")
    return scorer, corpora


def _write_records(folder: Path, corpora: Corpora, seen_prompts: NDArray[np.uint64], outcome: TrainingOutcome) -> None:
    np.union1d(seen_prompts, corpora.prompts).astype("<u8").tofile(folder / TRAINED_ON)
    write_log(folder, outcome.log, outcome.curve, outcome.events)


def _build_facts(config: TrainingSettings, outcome: TrainingOutcome, corpora: Corpora) -> dict[str, object]:
    """The facts about how the weights were chosen, for the manifest.

    `stopped_on` is the split that chose the weights and could stop training, "" if none did; `stopped_on_hash` is the
    hash of its instance ids (`instances_hash`), `stopped_on_instances` their number. `kept` says which weights the
    scorer has: those of the `start`, of an `earlier` check, or the `last`; `kept_because` gives the reason for the
    first two.
    """
    validation = corpora.validation
    kept = "last" if outcome.best_update == outcome.updates else "earlier" if outcome.best_update else "start"
    facts: dict[str, object] = {"kept": kept, "kept_because": outcome.reason, "stopped_on": ""}
    if stops_early(config, validation):
        ids = [validation.name(index) for index in range(len(validation))]
        facts |= {"stopped_on": "validation", "stopped_on_hash": instances_hash(ids), "stopped_on_instances": len(ids)}
    return facts


def instances_hash(ids: Iterable[str]) -> str:
    """One hash for a set of instance ids, independent of their order."""
    return fingerprint(sorted(set(ids)))


def _build_metrics(outcome: TrainingOutcome, corpora: Corpora) -> dict[str, float]:
    metrics: dict[str, float] = {
        "updates": outcome.updates,
        "best_update": outcome.best_update,
        "instances": corpora.instances,
        "cut_pairs": _count_truncated_pairs(corpora),
    }
    if len(corpora.validation):
        metrics["validation_pick"] = outcome.best_pick_label
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def _count_truncated_pairs(corpora: Corpora) -> int:
    return corpora.train.num_truncated_pairs + corpora.validation.num_truncated_pairs
