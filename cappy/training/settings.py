"""The settings of pretraining and finetuning: what the loop does, where it runs, and what is refused beforehand."""

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
    LOCATION,
    Fresh,
    Location,
    Renames,
    Work,
    changed_settings,
    flag,
    settings,
)
from cappy.errors import ConfigError, quote
from cappy.records.instance import SOURCES, Source
from cappy.specs import parse_spec
from cappy.training.losses import COMPARISONS, LossSettings

if TYPE_CHECKING:
    from cappy.scoring.config import Truncation

Schedule = Literal["linear", "published"]
Unit = Literal["instance", "row"]
Launcher = Literal["here", "trainjob", "customjob"]

PAPER_TRUNCATION: "Truncation" = "longest_first"
"""How the preset `paper` cuts a pair: the published code's `truncation=True` (cappy_bigbench.py, lines 73 to 79).

The scorer's folder records it, so that it is scored as it was trained.
"""
PAPER_PRESET: Mapping[str, object] = {
    "unit": "row",
    "batch_instances": 128,
    "train_rows": 102_400,
    "learning_rate": 2e-5,
    "warmup": 0.1,
    "schedule": "published",
    "weight_decay": 0.0,
    "clip": 0.0,
    **dict.fromkeys(COMPARISONS, 0.0),
    "keep": "last",
    "checks": 1,
    "head": "mse",
    "max_length": 512,
}
"""The preset `paper`: the published finetuning (Cappy's cappy_bigbench.py, 2023), as far as settings say it.

Rows of all instances in one order, 128 to an update, 102,400 in all however many there are; squared error on a raw
regression; AdamW without weight decay, gradients not clipped; the learning rate as the published code moved it; the
last weights kept, nothing looked at on the way. Still ours: the random draws. The settings of the published pretraining
are not known in full: there the preset sets the same, and `recipes/pretrain-360m.yaml` says what is known besides.
"""
_SOURCE_WEIGHT = re.compile(rf"({'|'.join(SOURCES)})=(\d+(?:\.\d+)?)")


@settings
class LoopSettings:
    """What the loop is to do, and how ranks share it."""

    RENAMED: ClassVar[Renames] = {"strategy": "parallelism"}

    source: Annotated[Location, Field(description="Folder of annotated instances")]
    target: Annotated[Location, Field(description="Scorer folder to write")]
    metric: Annotated[str, Field(description="Label to learn")] = "rougeL"
    preset: Annotated[
        Literal["default", "paper"],
        Field(description="paper: as the published finetuning, but for what is given besides"),
    ] = "default"
    unit: Annotated[
        Unit,
        ADVANCED,
        Field(description="What a batch is made of: whole instances, or single rows in any order (published)"),
    ] = "instance"
    train_rows: Annotated[
        int | None,
        ADVANCED,
        Field(ge=1, description="Responses to train on in all, repeated as needed; instead of --epochs"),
    ] = None
    sources: Annotated[
        tuple[Source, ...],
        ADVANCED,
        Field(description="Responses to train on: reference, choice, mismatch, llm; all if left out (for ablations)"),
    ] = ()
    weights: Annotated[
        tuple[str, ...],
        ADVANCED,
        Field(description="Weights in the head's loss by where a response came from, as mismatch=0.2; 1 if left out"),
    ] = ()
    epochs: Annotated[float, Field(gt=0, description="Draws per training response, in the mean and at most")] = 4.0
    batch_instances: Annotated[int, Field(ge=1, description="Instances (or rows) per update")] = 8
    batch_tokens: Annotated[
        int, Field(ge=64, description="Padded tokens per forward pass; bounds memory. Small is faster on a CPU")
    ] = 2048
    max_candidates: Annotated[
        int, ADVANCED, Field(ge=2, description="Responses drawn per instance and pass, anew in every pass")
    ] = 8
    learning_rate: Annotated[
        float | None, Field(gt=0, description="Peak learning rate; left out: 2e-5 x (1024 / hidden size)^2")
    ] = None
    warmup: Annotated[float, ADVANCED, Field(ge=0, lt=1, description="Share of the updates that warm up")] = 0.06
    schedule: Annotated[
        Schedule,
        ADVANCED,
        Field(description="linear: up over the warm-up, down to zero; published: a ramp that never ends (its bug)"),
    ] = "linear"
    weight_decay: Annotated[
        float, ADVANCED, Field(ge=0, description="AdamW's weight decay, biases and norms aside")
    ] = 0.01
    clip: Annotated[float, ADVANCED, Field(ge=0, description="Largest norm of a gradient; 0: no clipping")] = 1.0
    checks: Annotated[
        int, ADVANCED, Field(ge=1, description="Times the validation instances are scored on the way")
    ] = 10
    patience: Annotated[
        int,
        ADVANCED,
        Field(ge=1, description="Checks in a row, once the rate falls, clearly below the best before training stops"),
    ] = 4
    keep: Annotated[
        Literal["best", "last"],
        ADVANCED,
        Field(description="Weights kept: of the latest check not clearly below the best (stops early), or the last"),
    ] = "best"
    checkpoint_seconds: Annotated[
        float, LOCATION, ADVANCED, Field(ge=0, description="Seconds between checkpoints to resume from")
    ] = 60.0
    seed: Annotated[int, Field(description="Seed of order, draws and dropout")] = 0
    work: Work = DEFAULT_WORK
    fresh: Fresh = ""
    checkpoint_updates: Annotated[
        int | None, LOCATION, ADVANCED, Field(ge=1, description="Updates between checkpoints, beside those by time")
    ] = None
    precision: Annotated[
        Literal["auto", "fp32", "bf16"],
        ADVANCED,
        Field(description="Of matrix products in training; auto: bf16 on a GPU that has it, else fp32. Weights: fp32"),
    ] = "auto"
    dry_run: Annotated[
        bool, LOCATION, Field(description="Train 20 updates, print time, memory and hours of the whole, write nothing")
    ] = False
    parallelism: Annotated[
        Literal["auto", "single", "ddp", "deepspeed", "jax"],
        LOCATION,
        Field(description="How devices share an update; auto: single on one device, else ddp; jax: for TPUs"),
    ] = "auto"
    devices: Annotated[
        int, LOCATION, Field(ge=1, description="Ranks on this machine, each with a GPU or a CPU; with jax: its devices")
    ] = 1
    nodes: Annotated[
        int, LOCATION, Field(ge=1, description="Machines; more than one needs torchrun, a TrainJob or a CustomJob")
    ] = 1
    zero_stage: Annotated[
        int,
        LOCATION,
        ADVANCED,
        Field(ge=0, le=3, description="What deepspeed shards: 1 optimizer, 2 + gradients, 3 + weights"),
    ] = 1

    @property
    def source_weights(self) -> dict[Source, float]:
        """Weight of every source in the head's loss."""
        given = dict(text.split("=") for text in self.weights)
        return {source: float(given.get(source, 1.0)) for source in SOURCES}


@settings
class TrainJobSettings:
    """What a Kubeflow TrainJob is, beside what every job is."""

    volume: Annotated[str, Field(description="Shared volume to mount, CLAIM:/path; none: --work is there anyway")] = ""
    accelerator: Annotated[str, Field(description="Of each of the --devices: gpu or a resource; none: CPU")] = ""
    cpu: Annotated[str, Field(description="Cores of each node, such as 8; none: the runtime's")] = ""
    memory: Annotated[str, Field(description="Memory of each node, such as 64Gi; none: the runtime's")] = ""
    namespace: Annotated[str, Field(description="Kubernetes namespace; none: the current one")] = ""
    runtime: Annotated[str, Field(description="Training runtime of the job")] = "cappy-torch"

    def __post_init__(self) -> None:
        if self.volume and self.volume.count(":") != 1:
            remedy = "name a PersistentVolumeClaim and a folder"
            raise ConfigError(f"--trainjob.volume {self.volume}: is not a CLAIM:/path; {remedy}")


@settings
class CustomJobSettings:
    """What a Vertex AI CustomJob is, beside what every job is."""

    volume: Annotated[
        str,
        Field(description="Shared volume to mount, SERVER:/export:/mnt/nfs/name; none: --work is there anyway"),
    ] = ""
    accelerator: Annotated[str, Field(description="Of each of the --devices: such as NVIDIA_L4; none: CPU")] = ""
    project: Annotated[str, Field(description="Google Cloud project")] = ""
    region: Annotated[str, Field(description="Region of the job")] = "us-central1"
    bucket: Annotated[str, Field(description="gs:// bucket that Vertex AI stages in")] = ""
    network: Annotated[str, Field(description="VPC network, projects/NUMBER/global/networks/NAME; NFS needs it")] = ""
    machine: Annotated[str, Field(description="Machine type of each node")] = "n1-standard-8"
    spot: Annotated[bool, Field(description="Take spot machines, which may go")] = False

    def __post_init__(self) -> None:
        if self.volume and (self.volume.count(":") != 2 or not mount_point(self.volume).startswith("/mnt/nfs/")):
            remedy = "Vertex AI mounts under /mnt/nfs alone"
            raise ConfigError(f"--customjob.volume {self.volume}: is not a SERVER:/export:/mnt/nfs/name; {remedy}")


@settings
class LauncherSettings:
    """Where to train, and what a job on a platform needs."""

    RENAMED: ClassVar[Renames] = {
        "retries": "max_restarts",
        **{name: (f"trainjob.{name}", f"customjob.{name}") for name in ("volume", "accelerator")},
        **{name: f"trainjob.{name}" for name in ("cpu", "memory", "namespace", "runtime")},
        **{name: f"customjob.{name}" for name in ("project", "region", "bucket", "network", "machine", "spot")},
    }

    launcher: Annotated[
        Launcher, LOCATION, Field(description="Where to train: here, or as a Kubeflow TrainJob or a Vertex CustomJob")
    ] = "here"
    image: Annotated[
        str,
        LOCATION,
        ADVANCED,
        Field(description="Image of the job, the same code inside; none: the runtime's (trainjob)"),
    ] = ""
    service_account: Annotated[str, LOCATION, ADVANCED, Field(description="Service account that the job runs as")] = ""
    max_restarts: Annotated[
        int,
        LOCATION,
        ADVANCED,
        Field(ge=0, description="Times that a preempted or failed job is submitted again, if it got on"),
    ] = 5
    timeout_hours: Annotated[
        float, LOCATION, ADVANCED, Field(gt=0, description="Hours after which the job is cancelled, waiting included")
    ] = 168.0
    trainjob: Annotated[TrainJobSettings, LOCATION, ADVANCED] = TrainJobSettings()
    customjob: Annotated[CustomJobSettings, LOCATION, ADVANCED] = CustomJobSettings()

    @property
    def job_volume(self) -> str:
        """The shared volume of the platform's job; empty where training runs here."""
        own = {"trainjob": self.trainjob.volume, "customjob": self.customjob.volume}
        return own.get(self.launcher, "")


@settings
class TrainingSettings(LauncherSettings, LossSettings, LoopSettings):
    """What pretraining and finetuning have in common."""

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, given: object) -> object:
        """Before anything is checked it is still known which settings were given."""
        if not isinstance(given, ArgsKwargs):
            return given
        known = [field.name for field in dataclasses.fields(cls)]
        return ArgsKwargs((), _apply_preset(given.kwargs or {}, known))

    def __post_init__(self) -> None:
        _refuse_bad_weights(self)
        _refuse_unlaunchable(self)
        _refuse_unused(self)


def mount_point(volume: str) -> str:
    """The folder at which a volume is mounted; empty where none is named."""
    return volume.rpartition(":")[2]


def _apply_preset(given: Mapping[str, object], known: Collection[str]) -> dict[str, object]:
    """The settings that were given, and the preset's for those of `known` that were not.

    Whatever is given wins, also where it is a setting's default. `epochs` stand in the place of `train_rows`.
    """
    if given.get("preset") != "paper":
        return dict(given)
    own = {name: value for name, value in PAPER_PRESET.items() if name in known}
    if "epochs" in given:
        own.pop("train_rows", None)
    return {**own, **given}


def _refuse_bad_weights(config: LoopSettings) -> None:
    if config.weights and config.unit == "row":
        raise ConfigError("--weights: weigh responses of one instance, a row has one; give --unit instance")
    for text in config.weights:
        if not _SOURCE_WEIGHT.fullmatch(text):
            remedy = f"write one of {', '.join(SOURCES)}, an equals sign and a number, as mismatch=0.2"
            raise ConfigError(f"--weights: {quote(text)} is not a weight of a source; {remedy}")
    weighed = [text.split("=")[0] for text in config.weights]
    twice = next((source for source in weighed if weighed.count(source) > 1), None)
    if twice:
        raise ConfigError(f"--weights: gives {twice} twice; give it once")
    idle = next((source for source in weighed if config.sources and source not in config.sources), None)
    if idle:
        raise ConfigError(f"--weights: weighs {idle}, which --sources leaves out; leave one of them out")


def _refuse_unused(config: TrainingSettings) -> None:
    """ConfigError for a setting that is other than its default and has no effect beside the others."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, why in _unused_settings(config):
        if name not in defaults or (value := getattr(config, name)) == defaults[name]:
            continue
        path = name
        if dataclasses.is_dataclass(value):
            path = f"{name}.{changed_settings(value)[0]}"
        raise ConfigError(f"{flag(path)}: has no effect {why}; leave it out")


def _unused_settings(config: TrainingSettings) -> Iterator[tuple[str, str]]:
    """Each setting that has no effect beside the others, and why, at its default or not."""
    if config.train_rows is not None:
        yield "epochs", "with --train-rows, which says how long training is"
    if config.keep == "last":
        yield "patience", "with --keep last, which never stops early"
    elif config.schedule == "published":
        yield "patience", "with --schedule published: it counts once the rate falls, and that one never does"
    if config.unit == "row":
        yield "max_candidates", "with --unit row, whose batches are single responses"
        for name in COMPARISONS:
            if getattr(config, name):
                yield name, "with --unit row: a response alone is compared with none"
    if config.parallelism != "deepspeed":
        yield "zero_stage", "without --parallelism deepspeed"
    if getattr(config, "encoder", "builtin") != "builtin":
        yield "layers", "on an encoder that is there already; it is for --encoder builtin"
        yield "hidden_size", "on an encoder that is there already; it is for --encoder builtin"
    for name in ("trainjob", "customjob"):
        if config.launcher != name:
            yield name, f"without --launcher {name}"
    if config.launcher == "here":
        for name in ("image", "service_account", "max_restarts", "timeout_hours"):
            yield name, "where training runs here; give --launcher trainjob or customjob"


def _refuse_unlaunchable(config: TrainingSettings) -> None:
    """ConfigError where the job that these settings ask for could not run, before anything is submitted."""
    if config.launcher == "here":
        return
    launcher = f"--launcher {config.launcher}"
    if config.dry_run:
        raise ConfigError(f"{launcher}: a dry run has nothing to follow; run it with --launcher here on such a machine")
    if config.parallelism == "jax" and config.nodes > 1:
        remedy = "give --nodes 1"
        raise ConfigError(
            f"{launcher}: --parallelism jax drives one machine, and {config.nodes} were asked for; {remedy}"
        )
    own = config.customjob
    if config.launcher == "customjob" and not (config.image and own.project and own.bucket.startswith("gs://")):
        remedy = "needs --image, --customjob.project and --customjob.bucket gs://...; give them"
        raise ConfigError(f"{launcher}: {remedy}")
    if config.launcher == "customjob" and config.devices > 1 and not own.accelerator and config.parallelism != "jax":
        remedy = "give --customjob.accelerator, or --devices 1"
        raise ConfigError(f"{launcher}: {config.devices} devices and no accelerator; {remedy}")
    _refuse_unshared_paths(config, launcher)


def _refuse_unshared_paths(config: TrainingSettings, launcher: str) -> None:
    """The job's machines have another working directory, and see of this one's disks the shared volume alone."""
    starts = {name: str(getattr(config, name)) for name in ("scorer", "encoder") if hasattr(config, name)}
    mounted = mount_point(config.job_volume)
    folders = {name: text for name, text in starts.items() if parse_spec(text).kind == "path"}
    for name, path in {"work": str(config.work), **folders}.items():
        if not path.startswith("/"):
            remedy = "give an absolute path on a volume that the job's machines mount"
            raise ConfigError(f"{launcher}: --{name} {path}: is a relative path; {remedy}")
        if mounted and not PurePosixPath(path).is_relative_to(mounted):
            raise ConfigError(f"{launcher}: --{name} {path}: does not lie on the volume, under {mounted}; put it there")
