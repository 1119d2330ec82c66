"""How the ranks share an update: one process, replicas, or DeepSpeed's shards."""

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
    return Replicas(scorer.model, plan, ranks)
