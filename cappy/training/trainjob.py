"""A training step as a Kubeflow TrainJob: what `TrainerClient.train(trainer=...)` takes.

The SDK ships the source of one function to every node, where torchrun calls it in each rank; ours calls the module that
every launcher calls. What to do travels in the environment, because the SDK's backends hand over arguments differently
(one by keyword, one as a dictionary).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from cappy.config import encode, to_values
from cappy.training.settings import TrainingSettings

if TYPE_CHECKING:
    from kubeflow.trainer import CustomTrainer

STEP_VARIABLE = "CAPPY_TRAINING_STEP"
SETTINGS_VARIABLE = "CAPPY_TRAINING_SETTINGS"


def rank() -> None:
    """One rank; it must stand alone, because only its source text arrives."""
    import os

    from cappy.training.__main__ import main

    main([os.environ["CAPPY_TRAINING_STEP"], os.environ["CAPPY_TRAINING_SETTINGS"]])


def trainer(
    step: str,
    plan: TrainingSettings,
    *,
    image: str | None = None,
    resources: Mapping[str, str | int] | None = None,
    environment: Mapping[str, str] | None = None,
) -> "CustomTrainer":
    """The CustomTrainer of a step on `plan.nodes` machines with `resources` each, such as {"gpu": 4}.

    `plan.source`, `plan.target` and `plan.work` must lie on a volume that every node mounts; torchrun starts one rank
    per GPU. The image needs cappy, nothing is installed when the job starts.
    """
    from kubeflow.trainer import CustomTrainer

    told = {STEP_VARIABLE: step, SETTINGS_VARIABLE: encode(to_values(plan))}
    return CustomTrainer(
        func=rank,
        image=image,
        num_nodes=plan.nodes,
        resources_per_node=dict(resources) if resources else None,
        env={**(environment or {}), **told},
    )
