"""Docker on this machine: the images of the recipe, the caller's own folder, nothing of a cluster."""

from typing import Any

from pipelines.dressing import Dress
from pipelines.profiles import image
from pipelines.recipe import Recipe


def dress(recipe: Recipe) -> Dress:
    """The tasks of a recipe for a container engine: each in its image; cores and memory are the machine's.

    Keys are no part of a task, whose YAML is kept: `pipelines.containers` hands them to the engine.
    """

    def dressed(step: str, task: Any) -> None:
        task.set_container_image(image(recipe, step))

    return dressed
