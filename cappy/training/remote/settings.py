"""Where a training step trains: in its own process or as a job of a platform. Nothing of it changes the result."""

from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from cappy.config import LOCATION, settings
from cappy.errors import ConfigError

if TYPE_CHECKING:
    from cappy.training.plan import TrainingSettings

Launcher = Literal["here", "trainjob", "customjob"]


@settings
class LauncherSettings:
    """Where to train, and what a job on a platform needs."""

    launcher: Annotated[
        Launcher, LOCATION, Field(description="Where to train: here, or as a Kubeflow TrainJob or a Vertex CustomJob")
    ] = "here"
    image: Annotated[
        str, LOCATION, Field(description="Image of the job, the same code inside; none: the runtime's (trainjob)")
    ] = ""
    volume: Annotated[
        str,
        LOCATION,
        Field(
            description="Shared volume to mount, CLAIM:/path (trainjob) or SERVER:/export:/mnt/nfs/name (customjob); "
            "none: --work is there anyway"
        ),
    ] = ""
    accelerator: Annotated[
        str,
        LOCATION,
        Field(description="Of each of the --devices: gpu or a resource (trainjob), NVIDIA_L4 (customjob); none: CPU"),
    ] = ""
    cpu: Annotated[
        str, LOCATION, Field(description="Cores of each node, such as 8 (trainjob); none: the runtime's")
    ] = ""
    memory: Annotated[
        str, LOCATION, Field(description="Memory of each node, such as 64Gi (trainjob); none: the runtime's")
    ] = ""
    service_account: Annotated[str, LOCATION, Field(description="Service account that the job runs as")] = ""
    retries: Annotated[
        int, LOCATION, Field(ge=0, description="Times that a preempted or failed job is submitted again, if it got on")
    ] = 5
    timeout_hours: Annotated[
        float, LOCATION, Field(gt=0, description="Hours after which the job is cancelled, waiting included")
    ] = 168.0
    namespace: Annotated[str, LOCATION, Field(description="Kubernetes namespace; none: the current one (trainjob)")] = (
        ""
    )
    runtime: Annotated[str, LOCATION, Field(description="Training runtime of the job (trainjob)")] = "cappy-torch"
    project: Annotated[str, LOCATION, Field(description="Google Cloud project (customjob)")] = ""
    region: Annotated[str, LOCATION, Field(description="Region of the job (customjob)")] = "us-central1"
    bucket: Annotated[str, LOCATION, Field(description="gs:// bucket that Vertex AI stages in (customjob)")] = ""
    network: Annotated[
        str, LOCATION, Field(description="VPC network, projects/NUMBER/global/networks/NAME; NFS needs it (customjob)")
    ] = ""
    machine: Annotated[str, LOCATION, Field(description="Machine type of each node (customjob)")] = "n1-standard-8"
    spot: Annotated[bool, LOCATION, Field(description="Take spot machines, which may go (customjob)")] = False


def mount_point(volume: str) -> str:
    """The folder at which a volume is mounted; empty where none is named."""
    return volume.rpartition(":")[2]


def refuse_unlaunchable(plan: "TrainingSettings") -> None:
    """ConfigError where the job that these settings ask for could not run, before anything is submitted."""
    if plan.launcher == "here":
        return
    told = f"--launcher {plan.launcher}"
    if plan.dry_run:
        raise ConfigError(f"{told}: a dry run has nothing to follow; run it with --launcher here on such a machine")
    if plan.strategy == "jax" and plan.nodes > 1:
        raise ConfigError(f"{told}: --strategy jax drives one machine, and {plan.nodes} were asked for; give --nodes 1")
    if plan.launcher == "trainjob":
        _refuse_for_trainjob(plan, told)
    else:
        _refuse_for_customjob(plan, told)
    _refuse_out_of_reach(plan, told)


def per_node(plan: "TrainingSettings") -> dict[str, str | int]:
    """What each node of a TrainJob asks for, in Kubernetes' words; empty where the runtime says it."""
    asked: dict[str, str | int] = {plan.accelerator: plan.devices, "cpu": plan.cpu, "memory": plan.memory}
    return {name: amount for name, amount in asked.items() if name and amount}


def _refuse_for_trainjob(plan: "TrainingSettings", told: str) -> None:
    if plan.spot:
        raise ConfigError(f"{told}: --spot is for customjob; put the node selector of spot nodes into the runtime")
    if plan.volume and plan.volume.count(":") != 1:
        raise ConfigError(f"--volume {plan.volume}: is no CLAIM:/path; name a PersistentVolumeClaim and a folder")


def _refuse_for_customjob(plan: "TrainingSettings", told: str) -> None:
    if plan.cpu or plan.memory:
        raise ConfigError(f"{told}: --cpu and --memory are for trainjob; --machine has both, such as n1-standard-8")
    if not (plan.image and plan.project and plan.bucket.startswith("gs://")):
        raise ConfigError(f"{told}: needs --image, --project and --bucket gs://...; give them")
    if plan.volume and (plan.volume.count(":") != 2 or not mount_point(plan.volume).startswith("/mnt/nfs/")):
        remedy = "Vertex AI mounts under /mnt/nfs alone"
        raise ConfigError(f"--volume {plan.volume}: is no SERVER:/export:/mnt/nfs/name; {remedy}")
    if plan.devices > 1 and not plan.accelerator and plan.strategy != "jax":
        raise ConfigError(f"{told}: {plan.devices} devices and no accelerator; give --accelerator, or --devices 1")


def _refuse_out_of_reach(plan: "TrainingSettings", told: str) -> None:
    """The job's machines have another working directory, and see of this one's disks the shared volume alone."""
    starts = {name: str(getattr(plan, name)) for name in ("scorer", "encoder") if hasattr(plan, name)}
    mounted = mount_point(plan.volume)
    for name, path in {"work": str(plan.work), **{k: text for k, text in starts.items() if _is_folder(text)}}.items():
        if not path.startswith("/"):
            remedy = "give an absolute path on a volume that the job's machines mount"
            raise ConfigError(f"{told}: --{name} {path}: is a relative path; {remedy}")
        if mounted and not PurePosixPath(path).is_relative_to(mounted):
            raise ConfigError(f"{told}: --{name} {path}: does not lie on the volume, under {mounted}; put it there")


def _is_folder(text: str) -> bool:
    from cappy.specs import parse_spec

    return parse_spec(text).kind == "path"
