"""The child process of a local run: `python -m pipelines.execution REQUEST.json`, its output going to the run's log."""

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

from cappy.runs import PACKAGE, PROGRESS_VARIABLE
from cappy.worker import die_with_parent
from pipelines.clients.local import Request

if TYPE_CHECKING:
    from pipelines.builder import Pipeline


def main(request: Path) -> int:
    """Runs the pipeline of the request on kfp's local runner; 1 if a step failed."""
    wanted: Request = json.loads(request.read_text())
    die_with_parent()
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s - %(levelname)s - %(message)s")
    # kfp draws eight random digits for a local run's id: two runs may share them, and whoever started it cannot know.
    placeholder_utils.make_random_id = lambda: wanted["run"]
    local.init(
        _containers(wanted["recipe"], wanted["run"])
        if wanted.get("platform") == "docker"
        else local.SubprocessRunner(use_venv=False),
        pipeline_root=wanted["pipeline_root"],
        workspace_root=str(request.parent / "workspace"),
        enable_caching=True,
        cache_root=wanted["cache_root"],
    )
    pipeline = _pipeline(wanted)
    # Beside the log, where the exit step finds it for MLflow.
    Compiler().compile(pipeline, str(request.parent / PACKAGE))
    try:
        pipeline(**wanted["arguments"])
    except RuntimeError as error:
        # kfp says so when a task failed; what was wrong stands further up, in the step's own lines.
        sys.stdout.write(f"{error}\n")
        return 1
    return 0


def _pipeline(wanted: Request) -> "Pipeline":
    """The pipeline of a recipe, customized for where it runs, or one that stands in a module under its name."""
    if "recipe" in wanted:
        from pipelines.builder import build
        from pipelines.recipe import check_recipe

        return build(check_recipe(wanted["recipe"]), wanted["platform"])
    module, _, name = wanted["pipeline"].partition(":")
    pipeline: Pipeline = getattr(importlib.import_module(module), name)
    return pipeline


def _containers(recipe: Mapping[str, object], run: str) -> object:
    """A container for each step: as this user, in this folder, which is mounted where it lies.

    Files that steps name must lie under the current folder. The network is this machine's, so that MLflow's address
    means the same inside. Keys come from this process's environment, to every container of the run.
    """
    from pipelines.local import RUN_LABEL, key_files, keys
    from pipelines.recipe import check_recipe

    here = str(Path.cwd())
    secrets = keys(check_recipe(recipe))
    # No CAPPY_PARENT: a lock on a file tells of no process beyond a container's own.
    passed_on = {name: os.environ[name] for name in (PROGRESS_VARIABLE, "MLFLOW_TRACKING_URI") if name in os.environ}
    return local.DockerRunner(
        user=f"{os.getuid()}:{os.getgid()}",
        working_dir=here,
        environment={**secrets, **passed_on, "HOME": "/tmp"},  # noqa: S108 (in the container)
        labels={RUN_LABEL: run},
        network_mode="host",
        mounts=[_mount(here), *(_mount(file, read_only=True) for file in key_files(secrets))],
    )


def _mount(path: str, *, read_only: bool = False) -> object:
    from docker.types import Mount

    return Mount(target=path, source=path, type="bind", read_only=read_only)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
