"""Trains the built-in models.

    python -m cappy.builtin llm --target cappy/builtin/weights/llm
    python -m cappy.builtin scorer --target cappy/builtin/weights/scorer

The scorer is pretrained on samples of the built-in LLM, so train the LLM first. If the training of the scorer is
interrupted, the same command resumes it.
"""

import argparse
import sys
from pathlib import Path
from typing import TypedDict

_MAX_LENGTH = 256
_LEARNING_RATE = 1e-3
_BATCH_TOKENS = 1024
"""Small enough to keep the activations in cache: 160 pairs/s on one core, 125 with 2,048 (one trial)."""


def main() -> None:
    """Parses the command line and trains the model."""
    parser = argparse.ArgumentParser(
        prog="python -m cappy.builtin", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    llm = commands.add_parser("llm", help="train the very small LLM on the built-in tasks")
    llm.add_argument("--target", type=Path, required=True, help="folder to write; its files are overwritten")
    llm.add_argument("--steps", type=int, default=3000, help="updates of the weights")
    llm.add_argument("--processes", type=int, default=2, help="processes that share each batch, one thread each")
    llm.add_argument("--seed", type=int, default=0)
    llm.add_argument("--num-per-family", type=int, default=8_000, help="instances to draw from each family")
    scorer = commands.add_parser("scorer", help="pretrain the very small scorer on samples of the LLM")
    scorer.add_argument("--target", type=Path, required=True, help="folder to write")
    scorer.add_argument("--num-per-family", type=int, default=1_000, help="instances to draw from each family")
    scorer.add_argument("--epochs", type=float, default=4.0, help="passes over the instances")
    scorer.add_argument("--seed", type=int, default=0)
    scorer.add_argument("--work", type=Path, default=Path(".cappy/builtin"), help="folder to resume from")
    arguments = parser.parse_args()
    (_train_llm if arguments.command == "llm" else _pretrain_scorer)(arguments)


def _train_llm(arguments: argparse.Namespace) -> None:
    from cappy.builtin.llm import TrainingJob, train_llm

    train_llm(
        TrainingJob(
            target=arguments.target,
            steps=arguments.steps,
            processes=arguments.processes,
            seed=arguments.seed,
            num_per_family=arguments.num_per_family,
        )
    )


class _CommonSettings(TypedDict):
    """Settings common to all steps."""

    seed: int
    work: Path


def _pretrain_scorer(arguments: argparse.Namespace) -> None:
    """Samples responses of the built-in LLM on the pretraining pool, labels them and pretrains; steps can resume."""
    from cappy.annotation.step import AnnotationConfig
    from cappy.annotation.step import run as annotation
    from cappy.preparation.step import PreparationConfig
    from cappy.preparation.step import run as preparation
    from cappy.sampling.step import SamplingConfig
    from cappy.sampling.step import run as sampling
    from cappy.training.pretraining import PretrainingConfig
    from cappy.training.pretraining import run as pretraining

    prepared_folder, sampled_folder, annotated_folder = (
        arguments.work / name for name in ("prepared", "sampled", "annotated")
    )
    common_settings: _CommonSettings = {"seed": arguments.seed, "work": arguments.work}
    preparation_config = PreparationConfig(
        target=prepared_folder, pool="pretraining", num_per_family=arguments.num_per_family, **common_settings
    )
    preparation(preparation_config, _progress)
    sampling_config = SamplingConfig(
        source=prepared_folder, target=sampled_folder, generator=("builtin",), strategy="sampling8", **common_settings
    )
    sampling(sampling_config, _progress)
    annotation(AnnotationConfig(source=sampled_folder, target=annotated_folder, **common_settings), _progress)
    pretraining_config = PretrainingConfig(
        source=annotated_folder,
        target=arguments.target,
        max_length=_MAX_LENGTH,
        epochs=arguments.epochs,
        learning_rate=_LEARNING_RATE,
        batch_tokens=_BATCH_TOKENS,
        batch_instances=16,
        max_candidates=16,
        # The weights of the relative and of the listwise loss.
        relative=4.0,
        listwise=0.0,
        patience=100,
        **common_settings,
    )
    manifest = pretraining(pretraining_config, _progress)
    sys.stderr.write(f"{dict(manifest.metrics)}\n")


def _progress(done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = "") -> None:
    sys.stderr.write(f"\r{done}/{total} {unit}   ")


if __name__ == "__main__":
    main()
