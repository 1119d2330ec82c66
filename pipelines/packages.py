"""The YAML that is sent: compiled now, or one that was compiled and looked at before."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from cappy.errors import ConfigError, shown
from pipelines.compile import compiled
from pipelines.recipe import Platform, Recipe


def package_of(recipe: Recipe, platform: Platform, arguments: Mapping[str, Any], path: Path | None = None) -> str:
    """The YAML to send; a given file must be this recipe's pipeline, of no newer SDK, and take these arguments."""
    if path is None:
        return compiled(recipe, platform)
    try:
        text = path.read_text(encoding="utf-8")
        documents = list(yaml.safe_load_all(text))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())}); compile it again") from error
    spec = documents[0] if documents and isinstance(documents[0], dict) else {}
    if "sdkVersion" not in spec:
        raise ConfigError(f"{path}: is no compiled pipeline; write one with cappy pipeline compile --on {platform}")
    _refuse_newer(path, str(spec["sdkVersion"]))
    if platform == "vertex" and len(documents) > 1:
        raise ConfigError(f"{path}: was compiled for Kubeflow, Vertex AI refuses it; compile it with --on vertex")
    wanted = f"cappy-{recipe.pipeline.replace('_', '-')}"
    if (name := spec.get("pipelineInfo", {}).get("name")) != wanted:
        raise ConfigError(f"{path}: is pipeline {shown(name)}, the recipe's is {wanted}; compile it from this recipe")
    known = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    if lacking := set(arguments) - set(known):
        raise ConfigError(f"{path}: takes no {min(lacking)}, another version of cappy wrote it; compile it again")
    return text


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
