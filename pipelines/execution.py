"""The child process of a local run: `python -m pipelines.execution REQUEST.json`. Its output goes to the run's log."""

import importlib
import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kfp import local
from kfp.compiler import Compiler
from kfp.local import placeholder_utils

from cappy.runs import PROGRESS_VARIABLE, RUN_PACKAGE_FILE, RUN_VARIABLE, tune_garbage_collector
from cappy.worker import die_with_parent
from pipelines.clients.local import Request

if TYPE_CHECKING:
    from pipelines.builder import Pipeline


def main(path: Path) -> int:
    """Runs the requested pipeline on kfp's local runner; returns 1 if a step failed."""
    request: Request = json.loads(path.read_text())
    tune_garbage_collector()
    die_with_parent()
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s - %(levelname)s - %(message)s")
    # kfp would choose eight random digits as the run's id, which may repeat and which the parent does not know.
    placeholder_utils.make_random_id = lambda: request["run"]
    os.environ[RUN_VARIABLE] = request["run"]  # Steps in processes of this machine inherit it.
    local.init(
        _container_runner(request["recipe"], request["run"])
        if request.get("platform") == "docker"
        else local.SubprocessRunner(use_venv=False),
        pipeline_root=request["pipeline_root"],
        workspace_root=str(path.parent / "workspace"),
        enable_caching=True,
        cache_root=request["cache_root"],
    )
    pipeline = _load_pipeline(request)
    # The exit step logs this file to MLflow.
    Compiler().compile(pipeline, str(path.parent / RUN_PACKAGE_FILE))
    try:
        pipeline(**request["arguments"])
    except RuntimeError as error:
        # kfp raises it if a task failed; the step has already logged the cause.
        sys.stdout.write(f"{error}\n")
        return 1
    return 0


def _load_pipeline(request: Request) -> "Pipeline":
    """The pipeline of a recipe, customized for its platform, or the one at `module:name`."""
    if "recipe" in request:
        from pipelines.builder import build
        from pipelines.recipe import check_recipe

        return build(check_recipe(request["recipe"]), request["platform"])
    module, _, name = request["pipeline"].partition(":")
    pipeline: Pipeline = getattr(importlib.import_module(module), name)
    return pipeline


def _container_runner(recipe: Mapping[str, object], run: str) -> object:
    """A runner that starts one container per step, as this user, with the current folder mounted at the same path.

    Files that steps read must be under the current folder. Containers use the host's network, so that MLflow's address
    is the same inside. Every container gets the keys that this process has in its environment.
    """
    from pipelines.local import RUN_LABEL, key_files, key_variables
    from pipelines.recipe import check_recipe

    current_folder = str(Path.cwd())
    secrets = key_variables(check_recipe(recipe))
    # No CAPPY_PARENT: a container cannot see the lock of a process outside it.
    names = (PROGRESS_VARIABLE, RUN_VARIABLE, "MLFLOW_TRACKING_URI")
    forwarded = {name: os.environ[name] for name in names if name in os.environ}
    return local.DockerRunner(
        user=f"{os.getuid()}:{os.getgid()}",
        working_dir=current_folder,
        environment={**secrets, **forwarded, "HOME": "/tmp"},  # noqa: S108 (in the container)
        labels={RUN_LABEL: run},
        network_mode="host",
        mounts=[_mount(current_folder), *(_mount(file, read_only=True) for file in key_files(secrets))],
    )


def _mount(path: str, *, read_only: bool = False) -> object:
    from docker.types import Mount

    return Mount(target=path, source=path, type="bind", read_only=read_only)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
