"""A training step as a Vertex AI CustomJob: what `aiplatform.CustomJob(worker_pool_specs=...)` takes.

Vertex AI starts the same command on every machine and tells each of the others in CLUSTER_SPEC, which `place` reads;
the command then starts a rank per accelerator. The first machine is a pool of its own, the others are the second.
"""

from collections.abc import Mapping
from typing import Any

from cappy.config import encode, to_values
from cappy.errors import ConfigError
from cappy.training.settings import TrainingSettings


def worker_pools(
    step: str,
    plan: TrainingSettings,
    *,
    image: str,
    machine_type: str,
    accelerator_type: str = "",
    environment: Mapping[str, str] | None = None,
    volume: str = "",
) -> list[dict[str, Any]]:
    """The worker pools of a step on `plan.nodes` machines with `plan.devices` accelerators of this type each.

    `plan.source`, `plan.target` and `plan.work` must lie on a file system that every machine mounts and that locks and
    renames, such as NFS: `volume` is SERVER:/export:/mnt/nfs/name of one to mount. The image needs cappy and no entry
    point of its own. A TPU is part of the machine's type.
    ConfigError where a path is relative, or several ranks of a machine have no accelerator to be on.
    """
    if plan.strategy == "jax" and plan.nodes > 1:
        raise ConfigError(f"{step}: --strategy jax drives one machine, and {plan.nodes} were asked for; give --nodes 1")
    for name in ("source", "target", "work"):
        if not getattr(plan, name).is_absolute():
            remedy = "give a folder on a file system that all machines mount, such as NFS"
            raise ConfigError(f"{step}: --{name} {getattr(plan, name)}: is no absolute path; {remedy}")
    if plan.devices > 1 and not accelerator_type and plan.strategy != "jax":
        remedy = "name the accelerator_type, or give --devices 1"
        raise ConfigError(f"{step}: {plan.devices} devices per machine, and no accelerator is named; {remedy}")
    machine: dict[str, Any] = {"machine_type": machine_type}
    if accelerator_type:
        machine |= {"accelerator_type": accelerator_type, "accelerator_count": plan.devices}
    container = {
        "image_uri": image,
        "command": ["python", "-m", "cappy.training"],
        "args": [step, encode(to_values(plan))],
        "env": [{"name": name, "value": value} for name, value in (environment or {}).items()],
    }
    pool: dict[str, Any] = {"machine_spec": machine, "container_spec": container}
    if volume:
        server, export, folder = volume.split(":")
        pool["nfs_mounts"] = [{"server": server, "path": export, "mount_point": folder.removeprefix("/mnt/nfs/")}]
    others = [{**pool, "replica_count": plan.nodes - 1}] if plan.nodes > 1 else []
    return [{**pool, "replica_count": 1}, *others]
