"""Components chained: `adapt` makes a scorer for a task, `pretrain` a general one; `local` runs them on this machine.

Importing this package alone is light: kfp loads with the pipeline that needs it.
"""

PIPELINES = {"adapt": "pipelines.adapt", "pretrain": "pipelines.pretrain"}
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
}
"""Pipeline -> its steps, in order."""
