"""Training on TPUs, in JAX: a strategy of the one loop, with an encoder of its own.

No TPU was ever used here. What is known of this room was measured on a CPU that JAX split into eight devices, and on
one; speed on a TPU is unknown. One process drives all devices of one machine. Several machines, and parameters too
large for one device, are not covered.

Nothing outside this package imports jax or optax; this module alone imports neither.
"""

from typing import TYPE_CHECKING

from cappy.errors import ConfigError

if TYPE_CHECKING:
    from cappy.scoring.scorer import Scorer
    from cappy.training.settings import TrainingSettings
    from cappy.training.update import Strategy


def start(scorer: "Scorer", plan: "TrainingSettings") -> "Strategy":
    """The strategy `jax` in the place of the scorer's model; ConfigError where jax or optax cannot be imported."""
    if plan.precision == "bf16":
        raise ConfigError("--precision bf16: the strategy jax computes in fp32; leave the precision at auto or fp32")
    try:
        from cappy.training.tpu.strategy import OnDevices
    except ImportError as error:
        remedy = "pip install 'cappy-scorer[tpu]', or --strategy single"
        raise ConfigError(f"--strategy jax: cannot be imported ({error}); {remedy}") from error
    return OnDevices(scorer, plan)
