"""What each platform adds to a pipeline: one module for each, and what it cannot give is refused before submission."""

import json
from typing import Any

from components.component import TRAINER, WORKER
from pipelines.dressing import Dress
from pipelines.recipe import Platform, Recipe
from pipelines.resources import Resources

BACKOFF = {"backoff_duration": "30s", "backoff_factor": 2.0, "backoff_max_duration": "600s"}
"""Between attempts: a node that went away needs minutes to be replaced."""
TRAINING = ("pretraining", "finetuning")


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
    if needs.cpu:
        task.set_cpu_request(needs.cpu).set_cpu_limit(needs.cpu)
    if needs.memory:
        task.set_memory_request(needs.memory).set_memory_limit(needs.memory)
    if needs.retries and step != "tracking":
        task.set_retry(num_retries=needs.retries, **BACKOFF)
    limit = {"CAPPY_TIMEOUT": f"{needs.hours * 3600:.0f}"}
    address = {"MLFLOW_TRACKING_URI": recipe.tracking_uri} if recipe.tracking_uri else {}
    for name, value in {**limit, **address, **environment}.items():
        task.set_env_variable(name, value)
    return needs


def image(recipe: Recipe, step: str) -> str:
    """The image of a step: its own, else the recipe's for its kind, else the one with this version's tag."""
    if own := recipe.needs(step).image:
        return own
    if step in TRAINING:
        return recipe.images.get("trainer") or TRAINER
    return recipe.images.get("worker") or WORKER


def secrets_as_text(needs: Resources) -> str:
    """Which secret each variable comes from, for a step that reads them itself: names, never values."""
    return json.dumps({secret.variable: secret.name for secret in needs.secrets})
