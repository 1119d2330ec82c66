"""Specs: one syntax for the names of models, LLMs and scorers.

builtin                        the model that comes with the project
path/to/folder                 a folder on this machine
hub:org/name@revision          a Hugging Face repository at a pinned commit
openai:model@http://host/v1    an LLM behind an OpenAI-compatible endpoint
vllm:path, vllm:hub:...        a folder or a repository as above, run by vLLM
models:/name@alias             a version in the MLflow registry, by alias
models:/name/version           a version in the MLflow registry, by number
"""

import re
from dataclasses import dataclass
from typing import Literal

from cappy.errors import ConfigError, quote

Kind = Literal["builtin", "path", "hub", "openai", "vllm", "models"]

_REVISION = re.compile(r"[0-9a-f]{7,40}")
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
SCORER_FORMS = "builtin, a folder, hub:org/name@revision or models:/name@alias"
CHECKPOINT = "pytorch_model.bin"
FORMS = f"{SCORER_FORMS} for a scorer; builtin, a folder, hub:, vllm:folder or openai:model@http://host/v1 for an LLM"


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A parsed spec.

    `name` is the path, repository, model or registry name; for `vllm` the inner spec. `revision` is the commit, alias
    or version, `url` the address of an endpoint; both are empty if the kind has none.
    """

    text: str
    kind: Kind
    name: str
    revision: str = ""
    url: str = ""


def parse_spec(text: str) -> Spec:
    """Parses a spec. Raises ConfigError, which names the valid form, if the text is not one."""
    if text == "builtin":
        return Spec(text=text, kind="builtin", name="builtin")
    if text.startswith("hub:"):
        name, _, revision = text.removeprefix("hub:").partition("@")
        if not _REPOSITORY.fullmatch(name) or ".." in name or not _REVISION.fullmatch(revision):
            raise ConfigError(f"{quote(text)}: a hub spec is hub:org/name@revision with a commit hash as the revision")
        return Spec(text=text, kind="hub", name=name, revision=revision)
    if text.startswith("openai:"):
        name, _, url = text.removeprefix("openai:").partition("@")
        if not name or not url.startswith(("http://", "https://")):
            raise ConfigError(f"{quote(text)}: an endpoint is openai:model@http://host:port/v1")
        return Spec(text=text, kind="openai", name=name, url=url)
    if text.startswith("vllm:"):
        inner = text.removeprefix("vllm:")
        if not inner.strip() or parse_spec(inner).kind not in ("path", "hub"):
            raise ConfigError(f"{quote(text)}: a vLLM spec is vllm:folder or vllm:hub:org/name@revision")
        return Spec(text=text, kind="vllm", name=inner)
    if text.startswith("models:/"):
        name, separator, revision = re.fullmatch(r"([^@/]*)([@/]?)(.*)", text.removeprefix("models:/")).groups()  # type: ignore[union-attr]
        if not name or not revision or (separator == "/" and not revision.isdigit()):
            raise ConfigError(f"{quote(text)}: a registered version is models:/name@alias or models:/name/3")
        return Spec(text=text, kind="models", name=name, revision=revision)
    if not text.strip():
        raise ConfigError(f"a spec must not be empty; give {FORMS}")
    return Spec(text=text, kind="path", name=text)
