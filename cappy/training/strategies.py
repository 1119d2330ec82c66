"""How an update is shared: one process, replicas, DeepSpeed's shards, or JAX's devices."""

from cappy.scoring.scorer import Scorer
from cappy.training.plan import TrainingSettings
from cappy.training.ranks import Ranks
from cappy.training.replicas import Replicas
from cappy.training.update import Strategy


def start(scorer: Scorer, plan: TrainingSettings, ranks: Ranks) -> Strategy:
    """The strategy that the plan names, around the scorer's model."""
    if plan.strategy == "deepspeed":
        from cappy.training.sharded import Sharded

        sharded = Sharded(scorer.model, plan, ranks)
        scorer.through = sharded.engine  # It gathers sharded weights for a pass.
        return sharded
    if plan.strategy == "jax":
        from cappy.training import tpu

        return tpu.start(scorer, plan)
    return Replicas(scorer.model, plan, ranks)
