"""The YAML that is sent: compiled now, or one that was compiled and looked at before."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

import pipelines
from cappy.errors import ConfigError, shown
from cappy.yaml_files import load_all_yaml
from pipelines.compile import compiled
from pipelines.recipe import Platform, Recipe

JOB_ID = "{{$.pipeline_job_uuid}}"
"""What Vertex AI's YAML names a run by no more; see `compile`."""
_MAX_CHARACTERS = 2**23


def package_of(recipe: Recipe, platform: Platform, arguments: Mapping[str, Any], path: Path | None = None) -> str:
    """The YAML to send; a given file must be this recipe's pipeline, of no newer SDK, and take these arguments."""
    if path is None:
        return compiled(recipe, platform)
    try:
        text = path.read_text(encoding="utf-8")
        documents = load_all_yaml(text, max_characters=_MAX_CHARACTERS)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())}); compile it again") from error
    spec = documents[0] if documents and isinstance(documents[0], dict) else {}
    information, root = spec.get("pipelineInfo"), spec.get("root")
    if "sdkVersion" not in spec or not isinstance(information, dict) or not isinstance(root, dict):
        raise ConfigError(f"{path}: is no compiled pipeline; write one with cappy pipeline compile --on {platform}")
    _refuse_newer(path, str(spec["sdkVersion"]))
    if len(documents) != (2 if platform == "kubeflow" else 1) or (platform == "vertex" and JOB_ID in text):
        raise ConfigError(f"{path}: was compiled for another platform; compile it with --on {platform}")
    wanted = f"cappy-{recipe.pipeline.replace('_', '-')}"
    if (name := information.get("name")) != wanted:
        raise ConfigError(f"{path}: is pipeline {shown(name)}, the recipe's is {wanted}; compile it from this recipe")
    if _shards(spec) != pipelines.shards_of(recipe.shards):
        raise ConfigError(f"{path}: has other shards than the recipe's {recipe.shards}; compile it from this recipe")
    known = (root.get("inputDefinitions") or {}).get("parameters") or {}
    if lacking := set(arguments) - set(known):
        raise ConfigError(f"{path}: takes no {min(lacking)}, another version of cappy wrote it; compile it again")
    return text


def _shards(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """The parts that the pipeline's loop goes over; one that is all where there is no loop."""
    graphs = [each.get("dag", {}).get("tasks", {}) for each in (spec["root"], *spec.get("components", {}).values())]
    loops = [task["parameterIterator"] for tasks in graphs for task in tasks.values() if "parameterIterator" in task]
    return tuple(json.loads(loops[0]["items"]["raw"])) if loops else ("",)


def _refuse_newer(path: Path, sdk: str) -> None:
    """ConfigError where a newer kfp than this one compiled the file: its fields may not be understood."""
    ours = version("kfp")
    try:
        newer = _numbers(sdk.removeprefix("kfp-")) > _numbers(ours)
    except ValueError as error:
        raise ConfigError(f"{path}: sdkVersion {shown(sdk)} is none of kfp; compile it again") from error
    if newer:
        raise ConfigError(f"{path}: was compiled by {sdk}, here is kfp {ours}; compile it again here")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))
