"""The container engine of this machine: whether it answers and has the images, and which keys containers get."""

import os
from pathlib import Path

from cappy.errors import ConfigError, shown
from cappy.worker import ORPHAN_SECONDS
from pipelines.customize import image
from pipelines.recipe import Recipe

RUN_LABEL = "cappy.run"
"""The label that names a container's run."""
KEYS = (
    "OPENAI_API_KEY",
    "HF_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
)
"""Variables that steps, or what they call, take keys from without being told to."""


def keys(recipe: Recipe) -> dict[str, str]:
    """The variables with keys that are set here: the library's own, and those that the recipe's secrets name.

    `X_FILE` comes along for each X: it names a file that holds the key, see `key_files`. The values are for the
    containers' environment and stand nowhere else.
    """
    names = dict.fromkeys((*KEYS, *(variable for _, variable in _wanted(recipe))))
    told = [form for name in names for form in (name, f"{name}_FILE")]
    return {name: os.environ[name] for name in told if os.environ.get(name)}


def key_files(found: dict[str, str]) -> list[str]:
    """The files with keys that lie outside the current folder, which alone a container sees."""
    paths = [Path(os.path.abspath(value)) for name, value in found.items() if name.endswith("_FILE")]  # noqa: PTH100
    return [str(path) for path in dict.fromkeys(paths) if path.is_file() and not path.is_relative_to(Path.cwd())]


def check_secrets(recipe: Recipe) -> None:
    """ConfigError where a secret of the recipe is not set on this machine, from where containers get it."""
    found = keys(recipe)
    for step, variable in _wanted(recipe):
        if not {variable, f"{variable}_FILE"} & set(found):
            remedy = f"export {variable}, or {variable}_FILE with the path of a file that holds it"
            raise ConfigError(
                f"resources.{step}.secrets: {variable} is not set here, where containers get it; {remedy}"
            )


def end_containers(run: str) -> None:
    """Stops what still runs of a run: its steps get SIGTERM and may write a checkpoint; the engine removes them."""
    import docker

    client = docker.from_env()
    try:
        for container in client.containers.list(filters={"label": f"{RUN_LABEL}={run}"}):
            container.stop(timeout=int(ORPHAN_SECONDS))
    finally:
        client.close()


def _wanted(recipe: Recipe) -> list[tuple[str, str]]:
    """Step and variable of every secret that the recipe names."""
    steps = (*recipe.steps, "tracking")
    return [(step, secret.variable) for step in steps for secret in recipe.needs(step).secrets]


def check_images(recipe: Recipe) -> dict[str, str]:
    """Step -> what pins its image; ConfigError where no engine answers, or one is neither here nor to be pulled."""
    import docker
    from docker.errors import APIError, DockerException, ImageNotFound

    try:
        client = docker.from_env()
        client.ping()
    except DockerException as error:
        remedy = "start Docker (DOCKER_HOST says where it is), or run without --on docker"
        raise ConfigError(f"docker: no engine answers ({shown(str(error), 120)}); {remedy}") from error
    try:
        found: dict[str, str] = {}
        for name in dict.fromkeys(image(recipe, step) for step in (*recipe.steps, "tracking")):
            try:
                found[name] = client.images.get(name).id
            except ImageNotFound:
                found[name] = client.images.pull(name).id
    except APIError as error:
        remedy = "build it with make images, or name another under images: in the recipe"
        reason = shown(" ".join(str(error.explanation or error).split()), 120)
        raise ConfigError(f"{name}: is not here and cannot be pulled ({reason}); {remedy}") from error
    finally:
        client.close()
    return {step: found[image(recipe, step)] for step in recipe.steps}
