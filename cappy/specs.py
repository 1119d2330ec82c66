"""One grammar for everything that names a model, an LLM or a scorer, wherever it lies.

builtin                        the one that comes with the project
path/to/folder                 a folder on this machine
hub:org/name@revision          a Hugging Face repository at a pinned commit
openai:model@http://host/v1    an LLM behind an OpenAI-compatible endpoint
vllm:path, vllm:hub:...        a folder or a repository as above, run by vLLM
models:/name@alias             a version in the MLflow registry, by alias
models:/name/version           the same, by number
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cappy.errors import ConfigError, FolderError, shown
from cappy.hub_client import guard_client
from cappy.model_folder import ModelFolder, open_model_folder
from cappy.records.folder import MANIFEST, read_manifest

Kind = Literal["builtin", "path", "hub", "openai", "vllm", "models"]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"[0-9a-f]{7,40}")
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
SCORERS = "builtin, a folder, hub:org/name@revision or models:/name@alias"
CHECKPOINT = "pytorch_model.bin"
FORMS = f"{SCORERS} for a scorer; builtin, a folder, hub:, vllm:folder or openai:model@http://host/v1 for an LLM"


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A parsed spec: `name` is the path, repository, model or registry name; `revision` a commit, alias or version."""

    text: str
    kind: Kind
    name: str
    revision: str = ""
    url: str = ""


def parse_spec(text: str) -> Spec:
    """The parts of a spec; ConfigError says which forms there are."""
    if text == "builtin":
        return Spec(text=text, kind="builtin", name="builtin")
    if text.startswith("hub:"):
        name, _, revision = text.removeprefix("hub:").partition("@")
        if not _REPOSITORY.fullmatch(name) or ".." in name or not _REVISION.fullmatch(revision):
            raise ConfigError(f"{shown(text)}: a hub spec is hub:org/name@revision, the revision a commit hash")
        return Spec(text=text, kind="hub", name=name, revision=revision)
    if text.startswith("openai:"):
        name, _, url = text.removeprefix("openai:").partition("@")
        if not name or not url.startswith(("http://", "https://")):
            raise ConfigError(f"{shown(text)}: an endpoint is openai:model@http://host:port/v1")
        return Spec(text=text, kind="openai", name=name, url=url)
    if text.startswith("vllm:"):
        inner = text.removeprefix("vllm:")
        if not inner.strip() or parse_spec(inner).kind not in ("path", "hub"):
            raise ConfigError(f"{shown(text)}: a vLLM spec is vllm:folder or vllm:hub:org/name@revision")
        return Spec(text=text, kind="vllm", name=inner)
    if text.startswith("models:/"):
        name, separator, revision = re.fullmatch(r"([^@/]*)([@/]?)(.*)", text.removeprefix("models:/")).groups()  # type: ignore[union-attr]
        if not name or not revision or (separator == "/" and not revision.isdigit()):
            raise ConfigError(f"{shown(text)}: a registered version is models:/name@alias or models:/name/3")
        return Spec(text=text, kind="models", name=name, revision=revision)
    if not text.strip():
        raise ConfigError(f"a spec is empty; it is {FORMS}")
    return Spec(text=text, kind="path", name=text)


def open_scorer(text: str) -> ModelFolder:
    """The checked local folder of a scorer; ConfigError or FolderError with the remedy.

    Folders that other tools wrote have no manifest to check: they are hashed as found.
    """
    spec = parse_spec(text)
    if spec.kind in ("openai", "vllm"):
        raise ConfigError(f"{shown(text)}: an endpoint samples, it does not score; a scorer is {SCORERS}")
    folder = _local(spec)
    if not (folder / "config.json").exists():
        if (folder / MANIFEST).exists():
            step = read_manifest(folder).step
            raise FolderError(f"{folder}: has no config.json: what {step} left, and no scorer; a scorer is {SCORERS}")
        raise FolderError(f"{folder}: neither manifest.json nor config.json, so it is no scorer; a scorer is {SCORERS}")
    return open_model_folder(folder)


def scorer_folder(text: str) -> Path:
    """The path of `open_scorer`."""
    return open_scorer(text).path


def _local(spec: Spec) -> Path:
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
        raise FolderError(f"{folder}: no such folder; a scorer is {SCORERS}")
    return folder


def hub_folder(spec: Spec, *, also: Sequence[str] = ()) -> Path:
    """Downloads a pinned repository, safetensors, tokenizer and `also` alone; ConfigError if it cannot be had."""
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", *also]
    guard_client()
    try:
        commit = _commit(spec)
        folder = Path(snapshot_download(spec.name, revision=commit, allow_patterns=wanted))
    except ConfigError:
        raise
    except Exception as error:  # whatever the client raises over an answer: it has a dozen kinds, of three libraries
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{spec.text}: cannot be had from the hub ({shown(reason, 100)}); check name, revision and network"
        ) from error
    # The hub answers a name of seven or more hexadecimal digits with a branch of that name, which can move.
    if not folder.name.startswith(spec.revision):
        raise _no_commit(spec, folder.name)
    return folder


def _commit(spec: Spec) -> str:
    """The whole hash of a shortened commit; as it stands where the hub is not asked."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode

    if _COMMIT.fullmatch(spec.revision) or is_offline_mode():
        return spec.revision
    found = str(HfApi().model_info(spec.name, revision=spec.revision).sha)
    if not _COMMIT.fullmatch(found) or not found.startswith(spec.revision):
        raise _no_commit(spec, found)
    return found


def _no_commit(spec: Spec, found: str) -> ConfigError:
    return ConfigError(f"{spec.text}: is not a commit but a name of {shown(found, 50)}; give the whole commit hash")
