"""Specs: one syntax for the names of models, LLMs and scorers.

builtin                        the model that comes with the project
builtin:tiny                   a scorer for tests that comes with the project, of 1.7M parameters
path/to/folder                 a folder on this machine
hub:org/name@revision          a Hugging Face repository at a pinned commit
openai:model@http://host/v1    an LLM behind an OpenAI-compatible endpoint
vllm:path, vllm:hub:...        a folder or a repository as above, run by vLLM
recorded:path                  samples that an LLM gave earlier, in a file or a folder of records
models:/name@alias             a version in the MLflow registry, by alias
models:/name/version           a version in the MLflow registry, by number
"""

import re
from dataclasses import dataclass
from typing import Literal

from cappy.errors import ConfigError, quote

Kind = Literal["builtin", "path", "hub", "openai", "vllm", "recorded", "models"]

_REVISION = re.compile(r"[0-9a-f]{7,40}")
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
SCORER_FORMS = "builtin, a folder, hub:org/name@revision or models:/name@alias"
CHECKPOINT = "pytorch_model.bin"
_PROVIDERS = (
    (re.compile(r"(ft:)?(chatgpt|gpt|o[0-9])\b"), "https://api.openai.com/v1"),
    (re.compile(r"claude\b"), "https://api.anthropic.com/v1"),
    (re.compile(r"gemini\b"), "https://generativelanguage.googleapis.com/v1beta/openai"),
)
"""Beginning of a model's name -> the address of its provider's OpenAI-compatible API."""
FORMS = (
    f"{SCORER_FORMS} for a scorer; builtin, a folder, hub:, vllm:folder, openai:model@http://host/v1 or recorded:FILE "
    "for an LLM"
)


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
    if text in ("builtin", "builtin:tiny"):
        return Spec(text=text, kind="builtin", name=text.removeprefix("builtin:"))
    if text.startswith("hub:"):
        name, _, revision = text.removeprefix("hub:").partition("@")
        if not _REPOSITORY.fullmatch(name) or ".." in name or not _REVISION.fullmatch(revision):
            raise ConfigError(f"{quote(text)}: a hub spec is hub:org/name@revision with a commit hash as the revision")
        return Spec(text=text, kind="hub", name=name, revision=revision)
    if text.startswith("openai:"):
        name, _, url = text.removeprefix("openai:").partition("@")
        if not name or not url.startswith(("http://", "https://")):
            problem = "has no address" if name and not url else "is not openai:model@http://host:port/v1"
            raise ConfigError(f"{quote(text)}: {problem}; give {endpoint_form(name or 'NAME')}")
        return Spec(text=text, kind="openai", name=name, url=url)
    if text.startswith("vllm:"):
        inner = text.removeprefix("vllm:")
        if not inner.strip() or parse_spec(inner).kind not in ("path", "hub"):
            raise ConfigError(f"{quote(text)}: a vLLM spec is vllm:folder or vllm:hub:org/name@revision")
        return Spec(text=text, kind="vllm", name=inner)
    if text.startswith("recorded:"):
        path = text.removeprefix("recorded:")
        if not path.strip():
            raise ConfigError(
                f"{quote(text)}: recorded samples are recorded:FILE, or recorded: and a folder of records"
            )
        return Spec(text=text, kind="recorded", name=path)
    if text.startswith("models:/"):
        name, separator, revision = re.fullmatch(r"([^@/]*)([@/]?)(.*)", text.removeprefix("models:/")).groups()  # type: ignore[union-attr]
        if not name or not revision or (separator == "/" and not revision.isdigit()):
            raise ConfigError(f"{quote(text)}: a registered version is models:/name@alias or models:/name/3")
        return Spec(text=text, kind="models", name=name, revision=revision)
    if text.startswith(("http://", "https://")):
        address = quote(f"openai:NAME@{text}")
        raise ConfigError(f"{quote(text)}: is an address without a model; an LLM there is {address}")
    if not text.strip():
        raise ConfigError(f"a spec must not be empty; give {FORMS}")
    return Spec(text=text, kind="path", name=text)


def endpoint_form(model: str) -> str:
    """The spec of a model behind an API; its address is URL, with an example, if the name shows no known provider."""
    address = next((address for pattern, address in _PROVIDERS if pattern.match(model)), "")
    if address:
        return f"openai:{model}@{address}"
    return f"openai:{model}@URL with the address of its API, such as openai:{model}@http://localhost:8000/v1"


def missing_generator(name: str) -> ConfigError:
    """The error for the folder of an LLM that does not exist, with the spec that its name suggests."""
    if "/" not in name:
        remedy = f"an LLM behind an API is {endpoint_form(name)}"
    elif _REPOSITORY.fullmatch(name):
        remedy = f"a repository of the hub is hub:{name}@REVISION with a commit hash as the revision"
    else:
        remedy = "check the path"
    return ConfigError(f"{name}: no such folder; {remedy}")
