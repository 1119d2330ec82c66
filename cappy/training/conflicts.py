"""Settings of training that would do nothing beside others: refused, so that none is ignored in silence."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cappy.errors import ConfigError
from cappy.training.remote.settings import LauncherSettings

if TYPE_CHECKING:
    from cappy.training.plan import LoopSettings

LAUNCHER = tuple(field.name for field in dataclasses.fields(LauncherSettings) if field.name != "launcher")


def refuse_idle(plan: "LoopSettings") -> None:
    """ConfigError for a setting that is other than its default and has no effect beside the others."""
    defaults = {field.name: field.default for field in dataclasses.fields(plan)}
    for name, why in _idle(plan):
        if name in defaults and getattr(plan, name) != defaults[name]:
            raise ConfigError(f"--{name.replace('_', '-')}: has no effect {why}; leave it out")


def _idle(plan: "LoopSettings") -> Iterator[tuple[str, str]]:
    """Each setting that has no effect beside the others, and why, at its default or not."""
    if plan.train_rows is not None:
        yield "epochs", "with --train-rows, which says how long training is"
    if plan.keep == "last":
        yield "patience", "with --keep last, which never stops early"
    elif plan.schedule == "published":
        yield "patience", "with --schedule published: it counts once the rate falls, and that one never does"
    if plan.unit == "row":
        yield "max_candidates", "with --unit row, whose batches are single responses"
        yield "relative", "with --unit row: a response alone is compared with none"
        if plan.listwise:
            yield "listwise", "with --unit row: a response alone is compared with none"
    if plan.strategy != "deepspeed":
        yield "zero_stage", "without --strategy deepspeed"
    values: dict[str, Any] = vars(plan)
    if values.get("encoder", "builtin") != "builtin":
        yield "layers", "on an encoder that is there already; it is for --encoder builtin"
        yield "hidden_size", "on an encoder that is there already; it is for --encoder builtin"
    if values.get("launcher") == "here":
        for name in LAUNCHER:
            yield name, "where training runs here; give --launcher trainjob or customjob"
