"""Components chained: `adapt` makes a scorer for a task, `pretrain` a general one; others measure and use one.

Importing this package alone is light: kfp loads with the pipeline that needs it.
"""

from cappy.steps import STEP_SPECS

PIPELINES = {
    "adapt": "pipelines.adapt",
    "pretrain": "pipelines.pretrain",
    "evaluate": "pipelines.evaluate",
    "batch_score": "pipelines.batch_score",
}
"""Pipeline -> the module that holds it under its own name, and `plan`, which turns choices into settings."""

STEPS = {
    "adapt": (
        "preparation",
        "sampling",
        "annotation",
        "finetuning",
        "evaluation",
        "registration",
        "promotion",
        "deployment",
    ),
    "pretrain": ("preparation", "sampling", "annotation", "pretraining", "evaluation", "registration"),
    "evaluate": ("preparation", "sampling", "annotation", "evaluation"),
    "batch_score": ("preparation", "scoring"),
}
"""Pipeline -> its steps, in order; where shards are asked for, `gathering` stands after the last sharded one."""
MAX_SHARDS = 64
"""Vertex AI collects about a hundred artifacts at most, and Kubeflow slows down with large graphs."""


def steps_of(pipeline: str, shards: int = 1) -> tuple[str, ...]:
    """The steps of a pipeline in order, with `gathering` where its shards come together."""
    steps = STEPS[pipeline]
    if shards == 1:
        return steps
    last = max(index for index, step in enumerate(steps) if STEP_SPECS[step].sharded)
    return (*steps[: last + 1], "gathering", *steps[last + 1 :])


def shards_of(count: int) -> tuple[str, ...]:
    """The shards i/N that `sampling` and `scoring` take; one that is all has no name."""
    return tuple(f"{index}/{count}" for index in range(count)) if count > 1 else ("",)
