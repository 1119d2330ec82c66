"""A pipeline as the YAML that Kubeflow and Vertex AI take: `cappy pipeline compile`."""

import importlib
import tempfile
from pathlib import Path
from typing import Any

import pipelines
from pipelines.recipe import Platform, Recipe


def built(recipe: Recipe, platform: Platform = "local") -> Any:
    """The kfp pipeline of a recipe, each task dressed for the platform; ConfigError for a resource that it lacks."""
    from pipelines.profiles import dress_for

    module = importlib.import_module(pipelines.PIPELINES[recipe.pipeline])
    return module.build(pipelines.shards_of(recipe.shards), dress_for(platform, recipe))


def compiled(recipe: Recipe, platform: Platform = "local") -> str:
    """The YAML of a recipe; needs kfp and nothing heavier. Kubeflow's has a second document, with what pods get."""
    from kfp import dsl
    from kfp.compiler import Compiler

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        Compiler().compile(built(recipe, platform), str(path))
        text = path.read_text(encoding="utf-8")
    if platform == "vertex":
        # The job's id, which the submitter chooses; its number is known inside alone, and MLflow's run is named by it.
        text = text.replace(dsl.PIPELINE_JOB_ID_PLACEHOLDER, dsl.PIPELINE_JOB_NAME_PLACEHOLDER)
    return text
