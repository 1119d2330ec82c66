"""The settings of the loop, and the learning rate at every update."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import ArgsKwargs

from cappy.config import DEFAULT_WORK, LOCATION, Fresh, Location, Work, settings
from cappy.errors import ConfigError, shown
from cappy.records.instance import SOURCES, Source
from cappy.training.conflicts import refuse_idle
from cappy.training.paper import with_preset
from cappy.training.remote.settings import LauncherSettings, refuse_unlaunchable

SOURCE_WEIGHT = re.compile(rf"({'|'.join(SOURCES)})=(\d+(?:\.\d+)?)")
Schedule = Literal["linear", "published"]
Unit = Literal["instance", "row"]
PUBLISHED_MICRO = 16
"""Micro-batches of an update in the published finetuning."""


@settings
class LoopSettings:
    """What the loop is to do, and how ranks share it."""

    source: Annotated[Location, Field(description="Folder of annotated instances")]
    target: Annotated[Location, Field(description="Scorer folder to write")]
    metric: Annotated[str, Field(description="Label to learn")] = "rougeL"
    preset: Annotated[
        Literal["default", "paper"],
        Field(description="paper: as the published finetuning, but for what is given besides"),
    ] = "default"
    unit: Annotated[
        Unit,
        Field(description="What a batch is made of: whole instances, or single rows in any order (published)"),
    ] = "instance"
    train_rows: Annotated[
        int | None, Field(ge=1, description="Responses to train on in all, repeated as needed; instead of --epochs")
    ] = None
    sources: Annotated[
        tuple[Source, ...],
        Field(description="Responses to train on: reference, choice, mismatch, llm; all if left out (for ablations)"),
    ] = ()
    weights: Annotated[
        tuple[str, ...],
        Field(description="Weights in the head's loss by where a response came from, as mismatch=0.2; 1 if left out"),
    ] = ()
    epochs: Annotated[float, Field(gt=0, description="Draws per training response, in the mean and at most")] = 4.0
    batch_instances: Annotated[int, Field(ge=1, description="Instances (or rows) per update")] = 8
    batch_tokens: Annotated[
        int, Field(ge=64, description="Padded tokens per forward pass; bounds memory. Small is faster on a CPU")
    ] = 2048
    max_candidates: Annotated[
        int, Field(ge=2, description="Responses drawn per instance and pass, anew in every pass")
    ] = 8
    learning_rate: Annotated[
        float | None, Field(gt=0, description="Peak learning rate; left out: 2e-5 x (1024 / hidden size)^2")
    ] = None
    warmup: Annotated[float, Field(ge=0, lt=1, description="Share of the updates that warm up")] = 0.06
    schedule: Annotated[
        Schedule,
        Field(description="linear: up over the warm-up, down to zero; published: a ramp that never ends (its bug)"),
    ] = "linear"
    weight_decay: Annotated[float, Field(ge=0, description="AdamW's weight decay, biases and norms aside")] = 0.01
    clip: Annotated[float, Field(ge=0, description="Largest norm of a gradient; 0: no clipping")] = 1.0
    relative: Annotated[
        float,
        Field(
            ge=0,
            description="Weight of the relative loss (deviations from the mean of an instance's selectable responses)",
        ),
    ] = 0.0
    listwise: Annotated[
        float,
        Field(ge=0, description="Weight of the listwise loss (softmax over an instance's selectable responses)"),
    ] = 1.0
    checks: Annotated[int, Field(ge=1, description="Times the validation instances are scored on the way")] = 10
    patience: Annotated[
        int,
        Field(ge=1, description="Checks in a row, once the rate falls, clearly below the best before training stops"),
    ] = 4
    keep: Annotated[
        Literal["best", "last"],
        Field(description="Weights kept: of the latest check not clearly below the best (stops early), or the last"),
    ] = "best"
    checkpoint_seconds: Annotated[
        float, LOCATION, Field(ge=0, description="Seconds between checkpoints to resume from")
    ] = 60.0
    seed: Annotated[int, Field(description="Seed of order, draws and dropout")] = 0
    work: Work = DEFAULT_WORK
    fresh: Fresh = ""
    checkpoint_updates: Annotated[
        int | None, LOCATION, Field(ge=1, description="Updates between checkpoints, beside those by time")
    ] = None
    precision: Annotated[
        Literal["auto", "fp32", "bf16"],
        Field(description="Of matrix products in training; auto: bf16 on a GPU that has it, else fp32. Weights: fp32"),
    ] = "auto"
    dry_run: Annotated[
        bool, LOCATION, Field(description="Train 20 updates, print time, memory and hours of the whole, write nothing")
    ] = False
    strategy: Annotated[
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
        int, LOCATION, Field(ge=0, le=3, description="What deepspeed shards: 1 optimizer, 2 + gradients, 3 + weights")
    ] = 1

    def __post_init__(self) -> None:
        if self.weights and self.unit == "row":
            raise ConfigError("--weights: weigh responses of one instance, a row has one; give --unit instance")
        for text in self.weights:
            if not SOURCE_WEIGHT.fullmatch(text):
                remedy = f"write one of {', '.join(SOURCES)}, an equals sign and a number, as mismatch=0.2"
                raise ConfigError(f"--weights: {shown(text)} is no weight of a source; {remedy}")
        told = [text.split("=")[0] for text in self.weights]
        twice = next((source for source in told if told.count(source) > 1), None)
        if twice:
            raise ConfigError(f"--weights: gives {twice} twice; give it once")
        idle = next((source for source in told if self.sources and source not in self.sources), None)
        if idle:
            raise ConfigError(f"--weights: weighs {idle}, which --sources leaves out; leave one of them out")

    @property
    def source_weights(self) -> dict[Source, float]:
        """Weight of every source in the head's loss."""
        told = dict(text.split("=") for text in self.weights)
        return {source: float(told.get(source, 1.0)) for source in SOURCES}


@settings
class TrainingSettings(LauncherSettings, LoopSettings):
    """What pretraining and finetuning have in common."""

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, given: Any) -> Any:
        """Before anything is checked it is still known which settings were given."""
        fields: dict[str, Any] = cls.__dataclass_fields__
        return ArgsKwargs((), with_preset(given.kwargs or {}, fields)) if isinstance(given, ArgsKwargs) else given

    def __post_init__(self) -> None:
        LoopSettings.__post_init__(self)
        refuse_unlaunchable(self)
        refuse_idle(self)


def rate(update: int, updates: int, peak: float, warmup: float, schedule: Schedule = "linear") -> float:
    """Learning rate of an update (0-based): a linear rise over the warm-up share, then a linear fall to zero.

    Counted in updates of the optimizer. The published code planned its schedule in micro-batches, `PUBLISHED_MICRO` per
    update, and moved along it once per update: with its warm-up of a tenth the rate rises from 0 to 0.62 of the peak
    and never falls.
    """
    if schedule == "published":
        return peak * min(1.0, update / max(1.0, warmup * updates * PUBLISHED_MICRO))
    rising = _rising(updates, warmup)
    if update < rising:
        return peak * (update + 1) / rising
    return peak * (updates - update) / max(1, updates - rising)


def falls(update: int, updates: int, warmup: float, schedule: Schedule) -> bool:
    """Whether the learning rate falls after this many updates; the published one never does."""
    return schedule == "linear" and update >= _rising(updates, warmup)


def _rising(updates: int, warmup: float) -> int:
    return max(1, round(updates * warmup))


def default_rate(hidden_size: int) -> float:
    """Peak learning rate for an encoder of this width: 2e-5 at RoBERTa-large's 1024, growing as it gets narrower."""
    return 2e-5 * (1024 / hidden_size) ** 2
