"""Vertex AI: cores, memory and accelerators choose the machine; no document beside the pipeline's own."""

import re
from typing import Any

from cappy.errors import ConfigError
from pipelines.dressing import Dress
from pipelines.profiles import dress_common, refuse_anywhere, secrets_as_text
from pipelines.recipe import Recipe
from pipelines.resources import VERTEX_TYPES

SECRET = re.compile(r"projects/[^/]+/secrets/[^/]+/versions/[^/]+")


def dress(recipe: Recipe) -> Dress:
    """The tasks of a recipe for Vertex AI; ConfigError where it asks for what Vertex AI lacks."""
    for step in (*recipe.steps, "tracking"):
        _refuse(recipe, step)

    def dressed(step: str, task: Any) -> None:
        needs = recipe.needs(step)
        secrets = {"CAPPY_SECRETS": secrets_as_text(needs)} if needs.secrets else {}
        dress_common(recipe, step, task, {"HF_HOME": "/tmp/hub", **secrets})  # noqa: S108 (in the step's container)
        if needs.accelerator != "none" and needs.nodes == 1:
            task.set_accelerator_type(VERTEX_TYPES[needs.accelerator]).set_accelerator_limit(needs.count)

    return dressed


def _refuse(recipe: Recipe, step: str) -> None:
    needs = recipe.needs(step)
    where = f"resources.{step}"
    if needs.accelerator.startswith("tpu-"):
        remedy = "train on GPUs, or submit the job yourself: cappy STEP --launcher customjob --strategy jax"
        raise ConfigError(
            f"{where}.accelerator: Vertex AI gives the steps of a pipeline no {needs.accelerator}; {remedy}"
        )
    refuse_anywhere(recipe, step)
    if needs.nodes == 1 and needs.spot:
        remedy = "leave it out, or train as a CustomJob (nodes: 2 or more)"
        raise ConfigError(f"{where}.spot: Vertex AI has no spot machines for the steps of a pipeline; {remedy}")
    if needs.nodes > 1 and not needs.machine_type:
        raise ConfigError(f"{where}.machine_type: a CustomJob needs one; give such as a3-highgpu-8g")
    if needs.nodes == 1 and needs.machine_type:
        remedy = "give cpu, memory and accelerator, or train as a CustomJob (nodes: 2 or more)"
        raise ConfigError(f"{where}.machine_type: a step of a pipeline on Vertex AI has none to choose; {remedy}")
    if needs.node_selector or needs.tolerations:
        remedy = "leave them out; cpu, memory and accelerator choose the machine"
        raise ConfigError(f"{where}: node_selector and tolerations are Kubernetes'; {remedy}")
    for secret in needs.secrets:
        if not SECRET.fullmatch(secret.name):
            remedy = "name it projects/P/secrets/S/versions/V"
            raise ConfigError(f"{where}.secrets: {secret.variable} is from Secret Manager on Vertex AI; {remedy}")
