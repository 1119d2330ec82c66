"""Training on several nodes: the settings that make a training step submit a job of the platform and follow it."""

from typing import Any

from cappy.steps import TRAINING_STEPS
from pipelines.profiles import image
from pipelines.recipe import Platform, Recipe
from pipelines.resources import VERTEX_TYPES, kubernetes_resource


def launchers(recipe: Recipe, platform: Platform) -> dict[str, dict[str, Any]]:
    """Step -> settings of those training steps that spread over nodes; none where a step trains in its own pod.

    `retries` of the recipe are the job's and those of the step that follows it; so are `hours`, but for a little.
    """
    spread = [step for step in recipe.steps if step in TRAINING_STEPS and recipe.needs(step).nodes > 1]
    if platform == "kubeflow":
        return {step: _trainjob(recipe, step) for step in spread}
    if platform == "vertex":
        return {step: _customjob(recipe, step) for step in spread}
    return {}


def _shared(recipe: Recipe, step: str) -> dict[str, Any]:
    needs = recipe.needs(step)
    return {
        "nodes": needs.nodes,
        "devices": needs.count if needs.accelerator != "none" else 1,
        "image": image(recipe, step),
        "retries": needs.retries,
        # The job ends by itself before the step that follows it does, which then says why.
        "timeout_hours": 0.95 * needs.hours,
    }


def _trainjob(recipe: Recipe, step: str) -> dict[str, Any]:
    needs, place = recipe.needs(step), recipe.kubeflow
    accelerator = "" if needs.accelerator == "none" else kubernetes_resource(needs.accelerator)
    return {
        "launcher": "trainjob",
        **_shared(recipe, step),
        "cpu": needs.cpu,
        "memory": needs.memory,
        "volume": f"{place.volume}:{place.mount}",
        "accelerator": accelerator,
        "namespace": place.namespace,
        "runtime": place.runtime,
    }


def _customjob(recipe: Recipe, step: str) -> dict[str, Any]:
    needs, place = recipe.needs(step), recipe.vertex
    return {
        "launcher": "customjob",
        **_shared(recipe, step),
        "accelerator": VERTEX_TYPES.get(needs.accelerator, ""),
        "project": place.project,
        "region": place.region,
        "bucket": place.bucket,
        "network": place.network,
        "machine": needs.machine_type,
        "spot": needs.spot,
        "service_account": place.service_account,
    }
