"""What each platform adds to a pipeline: one module for each, and what it cannot give is refused before submission."""

import json
from typing import Any

from cappy.errors import ConfigError
from cappy.steps import TRAINING_STEPS
from components.component import TRAINER, TRAINER_TPU, WORKER
from pipelines.dressing import Dress
from pipelines.recipe import Platform, Recipe, refuse_password
from pipelines.resources import Resources

BACKOFF = {"backoff_duration": "30s", "backoff_factor": 2.0, "backoff_max_duration": "600s"}
"""Between attempts: a node that went away needs minutes to be replaced."""
FOLLOWER = ("1", "2Gi")
"""Cores and memory of a step that submits a job and follows it."""


def dress_for(platform: Platform, recipe: Recipe) -> Dress:
    """What the platform adds to each task; ConfigError for a resource that it lacks."""
    from pipelines.dressing import plain

    if platform == "local":
        return plain
    if platform == "kubeflow":
        from pipelines.profiles.kubeflow import dress
    elif platform == "vertex":
        from pipelines.profiles.vertex import dress
    else:
        from pipelines.profiles.docker import dress
    return dress(recipe)


def dress_common(recipe: Recipe, step: str, task: Any, environment: dict[str, str]) -> Resources:
    """What Kubeflow and Vertex AI have in common: image, cores, memory, attempts, variables."""
    needs = recipe.needs(step)
    task.set_container_image(image(recipe, step))
    # A step whose job trains elsewhere only follows it: what the recipe says is what each node of the job gets.
    cpu, memory = (needs.cpu, needs.memory) if needs.nodes == 1 else FOLLOWER
    if cpu:
        task.set_cpu_request(cpu).set_cpu_limit(cpu)
    if memory:
        task.set_memory_request(memory).set_memory_limit(memory)
    if needs.retries and step != "tracking":
        task.set_retry(num_retries=needs.retries, **BACKOFF)
    limit = {"CAPPY_TIMEOUT": f"{needs.hours * 3600:.0f}"}
    refuse_password("tracking_uri", recipe.tracking_uri)
    address = {"MLFLOW_TRACKING_URI": recipe.tracking_uri} if recipe.tracking_uri else {}
    for name, value in {**limit, **address, **environment}.items():
        task.set_env_variable(name, value)
    return needs


def refuse_anywhere(recipe: Recipe, step: str) -> None:
    """ConfigError for what no cluster can do: nodes of a step that does not train, a TPU without JAX."""
    needs, where = recipe.needs(step), f"resources.{step}"
    if needs.nodes > 1 and step not in TRAINING_STEPS:
        remedy = "give shards for more of them at a time"
        raise ConfigError(f"{where}.nodes: {needs.nodes}: only training spreads over nodes; {remedy}")
    if not needs.accelerator.startswith("tpu-"):
        return
    if step not in TRAINING_STEPS or recipe.settings.get(step, {}).get("strategy") != "jax":
        remedy = f"give settings.{step}.strategy: jax" if step in TRAINING_STEPS else "give it a GPU or none"
        raise ConfigError(f"{where}.accelerator: only training by JAX runs on a {needs.accelerator}; {remedy}")
    if needs.nodes > 1:
        raise ConfigError(f"{where}.nodes: {needs.nodes}: training by JAX drives one machine; give nodes: 1")


def image(recipe: Recipe, step: str) -> str:
    """The image of a step: its own, else the recipe's for its kind, else the one with this version's tag."""
    needs = recipe.needs(step)
    if needs.image:
        return needs.image
    if step in TRAINING_STEPS and needs.accelerator.startswith("tpu-"):
        return recipe.images.get("trainer-tpu") or TRAINER_TPU
    if step in TRAINING_STEPS:
        return recipe.images.get("trainer") or TRAINER
    return recipe.images.get("worker") or WORKER


def moving(recipe: Recipe) -> list[str]:
    """The images of a recipe that no digest pins."""
    return sorted({name for step in recipe.steps if "@" not in (name := image(recipe, step))})


def secrets_as_text(needs: Resources) -> str:
    """Which secret each variable comes from, for a step that reads them itself: names, never values."""
    return json.dumps({secret.variable: secret.name for secret in needs.secrets})
