"""Which of several machines this one is, as the platform tells it."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cappy.errors import ConfigError, shown
from cappy.training.plan import TrainingSettings

POOLS = ("workerpool0", "workerpool1")
"""Vertex AI's pools that train: the first machine, and the others. Pools 2 and 3 are for other servers."""


@dataclass(frozen=True, slots=True)
class Place:
    """Machine `node` of `nodes`; all meet at `address` and `port` (0: any free one, where there is one machine)."""

    node: int = 0
    nodes: int = 1
    address: str = "127.0.0.1"
    port: int = 0


def place(plan: TrainingSettings, environment: Mapping[str, str] | None = None) -> Place:
    """This machine's place: from Vertex AI's CLUSTER_SPEC, or from NODE_RANK with MASTER_ADDR and MASTER_PORT.

    ConfigError where more machines are asked for than told of.
    """
    told = os.environ if environment is None else environment
    found = Place()
    if spec := told.get("CLUSTER_SPEC"):
        found = _in_cluster(spec)
    elif {"NODE_RANK", "MASTER_ADDR", "MASTER_PORT"} <= told.keys() and plan.nodes > 1:
        found = Place(int(told["NODE_RANK"]), plan.nodes, told["MASTER_ADDR"], int(told["MASTER_PORT"]))
    if plan.nodes not in (1, found.nodes):
        remedy = "start it with torchrun, a TrainJob or a CustomJob, or set NODE_RANK, MASTER_ADDR and MASTER_PORT"
        raise ConfigError(f"--nodes {plan.nodes}: the environment tells of {found.nodes}; {remedy}")
    return found


def _in_cluster(spec: str) -> Place:
    try:
        values: dict[str, Any] = json.loads(spec)
        pools, task = values["cluster"], values["task"]
        machines = [(pool, index) for pool in POOLS for index in range(len(pools.get(pool, ())))]
        if len(machines) == 1:
            return Place()
        address, _, port = pools[POOLS[0]][0].rpartition(":")
        return Place(machines.index((task["type"], int(task["index"]))), len(machines), address, int(port))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(f"CLUSTER_SPEC: {shown(spec)} is not what Vertex AI writes; unset it or mend it") from error
