"""Resolves the spec of a scorer (`cappy.specs`) to a checked local folder."""

from pathlib import Path

from cappy.errors import ConfigError, FolderError, quote
from cappy.hub_client import hub_folder
from cappy.model_folder import ModelFolder, open_model_folder
from cappy.records.folder import MANIFEST, read_manifest
from cappy.specs import SCORER_FORMS, Spec, parse_spec


def open_scorer(text: str) -> ModelFolder:
    """The checked folder of a scorer, downloaded first if the spec names a repository or a registered version.

    Folders written by other tools have no manifest and are only hashed. Raises ConfigError, FolderError or
    RegistryError, with the remedy, if the spec does not lead to a valid scorer.
    """
    spec = parse_spec(text)
    if spec.kind in ("openai", "vllm"):
        raise ConfigError(f"{quote(text)}: an endpoint can sample but not score; a scorer is {SCORER_FORMS}")
    folder = _local_folder(spec)
    if not (folder / "config.json").exists():
        problem = "it has neither manifest.json nor config.json"
        if (folder / MANIFEST).exists():
            problem = f"it holds the output of {read_manifest(folder).step}, without a config.json"
        raise FolderError(f"{folder}: not a scorer: {problem}; a scorer is {SCORER_FORMS}")
    return open_model_folder(folder)


def scorer_folder(text: str) -> Path:
    """The path of the folder that `open_scorer` returns."""
    return open_scorer(text).path


def _local_folder(spec: Spec) -> Path:
    if spec.kind == "builtin":
        from cappy.builtin import SCORER_FOLDER

        return SCORER_FOLDER
    if spec.kind == "models":
        from cappy.registry import download

        return download(spec.text)
    if spec.kind == "hub":
        return hub_folder(spec)
    folder = Path(spec.name)
    if not folder.is_dir():
        raise FolderError(f"{folder}: no such folder; a scorer is {SCORER_FORMS}")
    return folder
