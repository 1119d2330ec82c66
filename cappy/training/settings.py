"""The settings of pretraining and finetuning, validated before anything heavy such as torch is imported."""

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import ArgsKwargs

from cappy.config import (
    ADVANCED,
    DEFAULT_WORK,
    RESULT_NEUTRAL,
    Cores,
    Fresh,
    Location,
    Memory,
    Renames,
    Work,
    changed_settings,
    flag,
    settings,
)
from cappy.errors import ConfigError, quote
from cappy.records.instance import SOURCES, Source
from cappy.specs import parse_spec
from cappy.training.losses import COMPARING_LOSSES, LossSettings

if TYPE_CHECKING:
    from cappy.scoring.config import Truncation

Schedule = Literal["linear", "published"]
Unit = Literal["instance", "row"]
Launcher = Literal["here", "trainjob", "customjob"]

PAPER_TRUNCATION: "Truncation" = "longest_first"
"""How the preset `paper` truncates a pair, as the published code does (`truncation=True` in cappy_bigbench.py, lines
73 to 79). The scorer's folder records it, so that scoring truncates pairs as training did."""
PAPER_PRESET: Mapping[str, object] = {
    "unit": "row",
    "batch_instances": 128,
    "train_rows": 102_400,
    "learning_rate": 2e-5,
    "warmup": 0.1,
    "schedule": "published",
    "weight_decay": 0.0,
    "clip": 0.0,
    **dict.fromkeys(COMPARING_LOSSES, 0.0),
    "keep": "last",
    "checks": 1,
    "head": "mse",
    "max_length": 512,
}
"""The preset `paper`: the published finetuning (Cappy's cappy_bigbench.py, 2023), as far as settings can express it.

Rows of all instances in one random order, 128 per update, 102,400 in total; squared error on a raw regression; AdamW
without weight decay or gradient clipping; the published learning rate schedule; the last weights kept, without checks
in between. The random draws differ. The settings of the published pretraining are not fully known: for pretraining the
preset sets the same values, and `recipes/pretrain-360m.yaml` contains what else is known.
"""
_NO_VOLUME = "default: none, --work must already be on a shared volume"
_SOURCE_WEIGHT = re.compile(rf"({'|'.join(SOURCES)})=(\d+(?:\.\d+)?)")


@settings
class LoopSettings:
    """Settings of the training loop and of how ranks share it."""

    RENAMED: ClassVar[Renames] = {"strategy": "parallelism"}

    source: Annotated[Location, Field(description="Folder of annotated instances")]
    target: Annotated[Location, Field(description="Scorer folder to write")]
    metric: Annotated[str, Field(description="Label to learn")] = "rougeL"
    preset: Annotated[
        Literal["default", "paper"],
        Field(description="paper: the settings of the published finetuning; given settings take precedence"),
    ] = "default"
    unit: Annotated[
        Unit,
        ADVANCED,
        Field(description="What a batch consists of: whole instances, or single rows in random order (as published)"),
    ] = "instance"
    train_rows: Annotated[
        int | None,
        ADVANCED,
        Field(ge=1, description="Total number of responses to train on, repeated as needed; instead of --epochs"),
    ] = None
    sources: Annotated[
        tuple[Source, ...],
        ADVANCED,
        Field(description="Sources of the responses to train on: reference, choice, mismatch, llm; default: all"),
    ] = ()
    weights: Annotated[
        tuple[str, ...],
        ADVANCED,
        Field(description="Weights in the head's loss by the source of a response, such as mismatch=0.2; default: 1"),
    ] = ()
    epochs: Annotated[
        float,
        Field(gt=0, description="How often each training response is drawn on average, unless training stops early"),
    ] = 4.0
    batch_instances: Annotated[int, Field(ge=1, description="Instances per update; rows with --unit row")] = 8
    batch_tokens: Annotated[
        int, Field(ge=64, description="Padded tokens per forward pass; bounds memory. Smaller is faster on a CPU")
    ] = 2048
    max_candidates: Annotated[
        int, ADVANCED, Field(ge=2, description="Responses drawn per instance and epoch, anew in every epoch")
    ] = 8
    learning_rate: Annotated[
        float | None, Field(gt=0, description="Peak learning rate; default: 2e-5 x (1024 / hidden size)^2")
    ] = None
    warmup: Annotated[float, ADVANCED, Field(ge=0, lt=1, description="Share of the updates used for warm-up")] = 0.06
    schedule: Annotated[
        Schedule,
        ADVANCED,
        Field(description="linear: warm-up, then decay to zero; published: a warm-up that never ends (a bug)"),
    ] = "linear"
    weight_decay: Annotated[
        float, ADVANCED, Field(ge=0, description="AdamW's weight decay, not applied to biases and norms")
    ] = 0.01
    clip: Annotated[float, ADVANCED, Field(ge=0, description="Maximum norm of the gradient; 0: no clipping")] = 1.0
    checks: Annotated[
        int, ADVANCED, Field(ge=1, description="How many times the validation instances are scored during training")
    ] = 10
    patience: Annotated[
        int,
        ADVANCED,
        Field(
            ge=1,
            description="Stop after this many consecutive checks that are below the best by more than the standard "
            "error; counted from the start of learning rate decay",
        ),
    ] = 4
    keep: Annotated[
        Literal["best", "last"],
        ADVANCED,
        Field(
            description="best: stop early and keep the weights of the latest check whose result is within the standard "
            "error of the best; last: keep the final weights"
        ),
    ] = "best"
    checkpoint_seconds: Annotated[
        float, RESULT_NEUTRAL, ADVANCED, Field(ge=0, description="Seconds between checkpoints")
    ] = 60.0
    seed: Annotated[int, Field(description="Random seed of order, draws and dropout")] = 0
    work: Work = DEFAULT_WORK
    fresh: Fresh = ""
    checkpoint_updates: Annotated[
        int | None,
        RESULT_NEUTRAL,
        ADVANCED,
        Field(ge=1, description="Updates between checkpoints, in addition to those by time"),
    ] = None
    precision: Annotated[
        Literal["auto", "fp32", "bf16"],
        ADVANCED,
        Field(description="Precision of matrix products; auto: bf16 on a GPU that has it, else fp32. Weights: fp32"),
    ] = "auto"
    dry_run: Annotated[
        bool,
        RESULT_NEUTRAL,
        Field(description="Train 20 updates, print speed, memory and the projected time, write nothing"),
    ] = False
    parallelism: Annotated[
        Literal["auto", "single", "ddp", "deepspeed", "jax"],
        RESULT_NEUTRAL,
        Field(description="How devices share an update; auto: single with one device, else ddp; jax: for TPUs"),
    ] = "auto"
    devices: Annotated[
        int,
        RESULT_NEUTRAL,
        Field(ge=1, description="Ranks per machine: one per GPU, or processes on a CPU; with jax: number of devices"),
    ] = 1
    nodes: Annotated[
        int,
        RESULT_NEUTRAL,
        Field(ge=1, description="Number of machines; several need torchrun, a TrainJob or a CustomJob"),
    ] = 1
    zero_stage: Annotated[
        int,
        RESULT_NEUTRAL,
        ADVANCED,
        Field(ge=0, le=3, description="What deepspeed shards: 1 optimizer, 2 + gradients, 3 + weights"),
    ] = 1

    @property
    def source_weights(self) -> dict[Source, float]:
        """Weight of every source in the head's loss."""
        weights = dict(weight.split("=") for weight in self.weights)
        return {source: float(weights.get(source, 1.0)) for source in SOURCES}


@settings
class TrainJobSettings:
    """Settings of a Kubeflow TrainJob, in addition to those of every job."""

    volume: Annotated[str, Field(description=f"Shared volume to mount, CLAIM:/path; {_NO_VOLUME}")] = ""
    accelerator: Annotated[str, Field(description="Accelerator per device: gpu or a resource name; default: CPU")] = ""
    cpu: Annotated[Cores, Field(description="Cores per node, such as 8; default: the runtime's")] = ""
    memory: Annotated[Memory, Field(description="Memory per node, such as 64Gi; default: the runtime's")] = ""
    namespace: Annotated[str, Field(description="Kubernetes namespace; default: the current one")] = ""
    runtime: Annotated[str, Field(description="Training runtime of the job")] = "cappy-torch"

    def __post_init__(self) -> None:
        if self.volume and self.volume.count(":") != 1:
            remedy = "name a PersistentVolumeClaim and a folder"
            raise ConfigError(f"--trainjob.volume {self.volume}: expected CLAIM:/path; {remedy}")


@settings
class CustomJobSettings:
    """Settings of a Vertex AI CustomJob, in addition to those of every job."""

    volume: Annotated[str, Field(description=f"Shared volume, SERVER:/export:/mnt/nfs/name; {_NO_VOLUME}")] = ""
    accelerator: Annotated[str, Field(description="Accelerator per device, such as NVIDIA_L4; default: CPU")] = ""
    project: Annotated[str, Field(description="Google Cloud project")] = ""
    region: Annotated[str, Field(description="Region of the job")] = "us-central1"
    bucket: Annotated[str, Field(description="gs:// bucket for Vertex AI's staging files")] = ""
    network: Annotated[str, Field(description="VPC network, projects/NUMBER/global/networks/NAME; NFS needs it")] = ""
    machine: Annotated[str, Field(description="Machine type of each node")] = "n1-standard-8"
    spot: Annotated[bool, Field(description="Use spot machines, which may be preempted")] = False

    def __post_init__(self) -> None:
        if self.volume and (self.volume.count(":") != 2 or not mount_point(self.volume).startswith("/mnt/nfs/")):
            remedy = "Vertex AI mounts only under /mnt/nfs"
            raise ConfigError(f"--customjob.volume {self.volume}: expected SERVER:/export:/mnt/nfs/name; {remedy}")


@settings
class LauncherSettings:
    """Where to train, and the settings of jobs on a platform."""

    RENAMED: ClassVar[Renames] = {
        "retries": "max_restarts",
        **{name: (f"trainjob.{name}", f"customjob.{name}") for name in ("volume", "accelerator")},
        **{name: f"trainjob.{name}" for name in ("cpu", "memory", "namespace", "runtime")},
        **{name: f"customjob.{name}" for name in ("project", "region", "bucket", "network", "machine", "spot")},
    }

    launcher: Annotated[
        Launcher,
        RESULT_NEUTRAL,
        Field(description="Where to train: here, as a Kubeflow TrainJob or as a Vertex AI CustomJob"),
    ] = "here"
    image: Annotated[
        str,
        RESULT_NEUTRAL,
        ADVANCED,
        Field(description="Image of the job, with the same version of cappy; default: the runtime's (trainjob)"),
    ] = ""
    service_account: Annotated[str, RESULT_NEUTRAL, ADVANCED, Field(description="Service account of the job")] = ""
    max_restarts: Annotated[
        int,
        RESULT_NEUTRAL,
        ADVANCED,
        Field(ge=0, description="How often a preempted or failed job is resubmitted, if it made progress"),
    ] = 5
    timeout_hours: Annotated[
        float,
        RESULT_NEUTRAL,
        ADVANCED,
        Field(gt=0, description="Hours after which the job is cancelled, including the time it waits"),
    ] = 168.0
    trainjob: Annotated[TrainJobSettings, RESULT_NEUTRAL, ADVANCED] = TrainJobSettings()
    customjob: Annotated[CustomJobSettings, RESULT_NEUTRAL, ADVANCED] = CustomJobSettings()

    @property
    def job_volume(self) -> str:
        """The shared volume of the job, "" if it has none or training runs here."""
        volumes = {"trainjob": self.trainjob.volume, "customjob": self.customjob.volume}
        return volumes.get(self.launcher, "")


@settings
class TrainingSettings(LauncherSettings, LossSettings, LoopSettings):
    """The settings that pretraining and finetuning share."""

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: object) -> object:
        """Fills in the preset before validation, when given settings can still be distinguished from defaults."""
        if not isinstance(values, ArgsKwargs):
            return values
        names = [field.name for field in dataclasses.fields(cls)]
        return ArgsKwargs((), _apply_preset(values.kwargs or {}, names))

    def __post_init__(self) -> None:
        _refuse_bad_weights(self)
        _refuse_unlaunchable(self)
        _refuse_unused(self)


def mount_point(volume: str) -> str:
    """The folder at which a volume is mounted, "" without a volume."""
    return volume.rpartition(":")[2]


def _apply_preset(values: Mapping[str, object], names: Collection[str]) -> dict[str, object]:
    """Adds the preset's values of those settings in `names` that are missing from `values`.

    A given setting takes precedence, even if it equals the default; `epochs` replaces the preset's `train_rows`.
    """
    if values.get("preset") != "paper":
        return dict(values)
    preset = {name: value for name, value in PAPER_PRESET.items() if name in names}
    if "epochs" in values:
        preset.pop("train_rows", None)
    return {**preset, **values}


def _refuse_bad_weights(config: LoopSettings) -> None:
    if config.weights and config.unit == "row":
        raise ConfigError(
            "--weights: has no effect with --unit row, which has one response per row; give --unit instance"
        )
    for weight in config.weights:
        if not _SOURCE_WEIGHT.fullmatch(weight):
            remedy = f"SOURCE is one of {', '.join(SOURCES)}, as in mismatch=0.2"
            raise ConfigError(f"--weights: {quote(weight)} is not SOURCE=NUMBER; {remedy}")
    weighted = [weight.split("=")[0] for weight in config.weights]
    if duplicate := next((source for source in weighted if weighted.count(source) > 1), None):
        raise ConfigError(f"--weights: gives {duplicate} twice; give it once")
    if excluded := next((source for source in weighted if config.sources and source not in config.sources), None):
        raise ConfigError(f"--weights: has a weight for {excluded}, which --sources excludes; leave one of them out")


def _refuse_unused(config: TrainingSettings) -> None:
    """Raises ConfigError if a setting differs from its default but has no effect in combination with the others."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, reason in _unused_settings(config):
        if name not in defaults or (value := getattr(config, name)) == defaults[name]:
            continue
        path = f"{name}.{changed_settings(value)[0]}" if dataclasses.is_dataclass(value) else name
        raise ConfigError(f"{flag(path)}: has no effect {reason}; leave it out")


def _unused_settings(config: TrainingSettings) -> Iterator[tuple[str, str]]:
    """Yields each setting without effect in combination with the others, and the reason, even if it has its default."""
    if config.train_rows is not None:
        yield "epochs", "with --train-rows, which sets the length of training"
    if config.keep == "last":
        yield "patience", "with --keep last, which never stops early"
    elif config.schedule == "published":
        yield "patience", "with --schedule published: it counts checks while the rate decays, and this rate never does"
    if config.unit == "row":
        yield "max_candidates", "with --unit row, whose batches are single responses"
        for name in COMPARING_LOSSES:
            if getattr(config, name):
                yield name, "with --unit row, where there are no responses to compare"
    if config.parallelism != "deepspeed":
        yield "zero_stage", "without --parallelism deepspeed"
    if getattr(config, "encoder", "builtin") != "builtin":
        yield "layers", "with an existing encoder, only with --encoder builtin"
        yield "hidden_size", "with an existing encoder, only with --encoder builtin"
    for name in ("trainjob", "customjob"):
        if config.launcher != name:
            yield name, f"without --launcher {name}"
    if config.launcher == "here":
        for name in ("image", "service_account", "max_restarts", "timeout_hours"):
            yield name, "with --launcher here, only with --launcher trainjob or customjob"


def _refuse_unlaunchable(config: TrainingSettings) -> None:
    """Raises ConfigError if the job of these settings could not run; nothing has been submitted yet."""
    if config.launcher == "here":
        return
    launcher = f"--launcher {config.launcher}"
    if config.dry_run:
        raise ConfigError(
            f"{launcher}: does not support --dry-run; run it with --launcher here on a machine of the same type"
        )
    if config.parallelism == "jax" and config.nodes > 1:
        raise ConfigError(
            f"{launcher}: --parallelism jax runs on one machine, but {config.nodes} were requested; give --nodes 1"
        )
    job = config.customjob
    if config.launcher == "customjob" and not (config.image and job.project and job.bucket.startswith("gs://")):
        raise ConfigError(
            f"{launcher}: needs an image, a project and a bucket; give --image, --customjob.project and "
            "--customjob.bucket gs://..."
        )
    if config.launcher == "customjob" and config.devices > 1 and not job.accelerator and config.parallelism != "jax":
        remedy = "give --customjob.accelerator, or --devices 1"
        raise ConfigError(f"{launcher}: {config.devices} devices but no accelerator; {remedy}")
    _refuse_unshared_paths(config, launcher)


def _refuse_unshared_paths(config: TrainingSettings, launcher: str) -> None:
    """Raises ConfigError for paths that the job's machines cannot read: relative ones, and ones outside the volume."""
    models = {name: str(getattr(config, name)) for name in ("scorer", "encoder") if hasattr(config, name)}
    mount = mount_point(config.job_volume)
    folders = {name: spec for name, spec in models.items() if parse_spec(spec).kind == "path"}
    for name, path in {"work": str(config.work), **folders}.items():
        if not path.startswith("/"):
            remedy = "give an absolute path on a volume that the job's machines mount"
            raise ConfigError(f"{launcher}: --{name} {path}: is a relative path; {remedy}")
        if mount and not PurePosixPath(path).is_relative_to(mount):
            raise ConfigError(f"{launcher}: --{name} {path}: is not on the volume mounted at {mount}; move it there")
