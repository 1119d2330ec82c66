"""The container engine of this machine: whether it answers and has the images, asked before a run begins."""

from cappy.errors import ConfigError, shown
from pipelines.profiles import image
from pipelines.recipe import Recipe


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
