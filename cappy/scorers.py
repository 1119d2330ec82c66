"""Resolves the spec of a scorer (`cappy.specs`) to a checked local folder."""

import json
from collections.abc import Mapping
from pathlib import Path

from cappy.errors import ConfigError, FolderError, quote
from cappy.hub_client import check_repository, hub_folder
from cappy.model_folder import ModelFolder, open_model_folder, read_tensor_sizes, refuse_pickles
from cappy.records.folder import MANIFEST, read_manifest
from cappy.specs import SCORER_FORMS, Spec, parse_spec

MODULES = "modules.json"
"""The file that lists the modules of a model of sentence-transformers."""


def open_scorer(text: str) -> ModelFolder:
    """The checked folder of a scorer, downloaded first if the spec names a repository or a registered version.

    Folders written by other tools have no manifest and are only hashed. Raises ConfigError, FolderError or
    RegistryError, with the remedy, if the spec does not lead to a valid scorer.
    """
    spec = parse_spec(text)
    _refuse_endpoint(spec)
    folder = _local_folder(spec)
    _refuse_other_folder(folder)
    return open_model_folder(folder)


def _refuse_endpoint(spec: Spec) -> None:
    if spec.kind in ("openai", "vllm", "recorded"):
        source = "a file of samples" if spec.kind == "recorded" else "an endpoint"
        raise ConfigError(f"{quote(spec.text)}: {source} can sample but not score; a scorer is {SCORER_FORMS}")


def _refuse_other_folder(folder: Path) -> None:
    """Raises FolderError for a folder without config.json."""
    if not (folder / "config.json").exists():
        problem = "it has neither manifest.json nor config.json"
        if (folder / MANIFEST).exists():
            problem = f"it holds the output of {read_manifest(folder).step}, without a config.json"
        elif modules := read_modules(folder):
            names = ", ".join(name for name, _ in modules)
            path = next((path for name, path in modules if name == "Transformer"), "")
            remedy = f"give its folder {path}" if path else "give a model whose first module is a Transformer"
            problem = f"it has no config.json, only the modules {names} of sentence-transformers ({remedy})"
        raise FolderError(f"{folder}: not a scorer: {problem}; a scorer is {SCORER_FORMS}")


def check_scorer(text: str) -> int:
    """Bytes that a run would download for a scorer; raises the errors of `open_scorer` that seconds can show.

    Reads config.json and the headers of the weights, and asks the hub for a repository; the registry is not asked.
    """
    spec = parse_spec(text)
    _refuse_endpoint(spec)
    if spec.kind == "hub":
        return check_repository(spec)
    if spec.kind == "path":
        folder = _local_folder(spec)
        _refuse_other_folder(folder)
        refuse_pickles(folder)
        read_tensor_sizes(folder)
    return 0


def scorer_folder(text: str) -> Path:
    """The path of the folder that `open_scorer` returns."""
    return open_scorer(text).path


def _local_folder(spec: Spec) -> Path:
    if spec.kind == "builtin":
        from cappy.builtin import TINY_SCORER_FOLDER

        return TINY_SCORER_FOLDER
    if spec.kind == "models":
        from cappy.registry import download

        return download(spec.text)
    if spec.kind == "hub":
        return hub_folder(spec)
    folder = Path(spec.name)
    if not folder.is_dir():
        raise FolderError(f"{folder}: no such folder; a scorer is {SCORER_FORMS}")
    return folder


def read_modules(folder: Path) -> list[tuple[str, str]]:
    """Name and folder of each module that a folder's modules.json lists; empty without that file.

    Raises FolderError if the file is not a list of modules.
    """
    path = folder / MODULES
    if not path.is_file():
        return []
    try:
        modules = json.loads(path.read_bytes())
    except ValueError as error:
        raise FolderError(f"{path}: is not JSON ({quote(str(error), 80)}); download the folder again") from error
    if not isinstance(modules, list) or not modules or not all(isinstance(module, Mapping) for module in modules):
        raise FolderError(f"{path}: is not a list of modules; download the folder again")
    return [(str(module.get("type", "")).rpartition(".")[2], str(module.get("path") or "")) for module in modules]
