"""Training on TPUs, in JAX: the loop of `cappy.training.loop` over a mesh of chips, with an encoder of its own.

No TPU was ever used here. What is known of this room was measured on a CPU that JAX split into eight devices
(`XLA_FLAGS=--xla_force_host_platform_device_count=8`) and on one; speed on a TPU is unknown. One process drives all
chips of one host. Several hosts, and parameters too large for one chip, are not covered.

Nothing outside this package imports jax or optax; this module alone imports neither.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cappy.errors import ConfigError
from cappy.progress import Progress

if TYPE_CHECKING:
    from cappy.scoring.scorer import Scorer
    from cappy.training.feed import Group
    from cappy.training.loop import Outcome
    from cappy.training.plan import TrainingSettings

Compute = Literal["float32", "bfloat16"]


def fit(
    scorer: "Scorer",
    train: Sequence["Group"],
    validation: Sequence["Group"],
    plan: "TrainingSettings",
    *,
    checkpoints: Path,
    progress: Progress,
    compute: Compute = "float32",
) -> "Outcome":
    """As `cappy.training.loop.fit`, on every device that JAX finds; ConfigError where jax or optax is not installed."""
    for package in ("jax", "optax"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"training: strategy jax needs {package}; install the extra tpu")
    from cappy.training.tpu.loop import fit as fit_with_jax

    return fit_with_jax(scorer, train, validation, plan, checkpoints=checkpoints, progress=progress, compute=compute)
