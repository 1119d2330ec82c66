"""The sampling step: draws candidates for every instance from one or several LLMs."""

import importlib.util
import json
import logging
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

from pydantic import Field

from cappy.config import ADVANCED, RESULT_NEUTRAL
from cappy.errors import ConfigError, FolderError, quote
from cappy.hub_client import check_repository, hub_folder
from cappy.specs import Spec, missing_generator, parse_spec

if TYPE_CHECKING:
    from cappy.model_folder import ModelFolder
    from cappy.sampling.generators import EndpointConfig, Generator, LocalGenerator
    from cappy.sampling.strategies import Decoding

__all__ = ["load_generator"]

Concurrency = Annotated[int, RESULT_NEUTRAL, Field(ge=1, le=1024, description="Concurrent requests to an endpoint")]
MaxTotalRequests = Annotated[
    int, RESULT_NEUTRAL, ADVANCED, Field(ge=0, description="Maximum requests of this run; 0: no limit")
]
MaxTotalTokens = Annotated[
    int, RESULT_NEUTRAL, ADVANCED, Field(ge=0, description="Maximum tokens of this run, input and output; 0: no limit")
]
MaxTotalCost = Annotated[float, RESULT_NEUTRAL, Field(ge=0, description="Maximum cost of this run; 0: no limit")]
PriceInput = Annotated[float, RESULT_NEUTRAL, Field(ge=0, description="Price of a million input tokens")]
PriceOutput = Annotated[float, RESULT_NEUTRAL, Field(ge=0, description="Price of a million output tokens")]
"""Settings that sampling and `cappy adapt` share."""
LOGGER = logging.getLogger(__name__)
CHECK_SECONDS = 4.0
"""Time limit of the request of `check_generator`."""
HOSTS_WITH_KEYS = ("openai.com", "anthropic.com", "googleapis.com", "mistral.ai", "openrouter.ai", "azure.com")
"""Providers that answer no request without a key, although some list their models without one."""
_NAMES_IN_ERROR = 5
"""Models of an endpoint that an error lists."""
_CAUSAL_SUFFIXES = ("ForCausalLM", "LMHeadModel")


def load_generator(text: str, config: "EndpointConfig | None" = None, *, work: Path | None = None) -> "Generator":
    """Loads the generator that a spec names; its `sample(instructions, decodings, seed=...)` draws candidates.

    `config` is used by an endpoint and includes the folder of its cached answers; an LLM on this machine stores its
    candidates in `work`. Raises ConfigError if the spec does not name a generator, or FolderError if its folder is not
    valid.
    """
    spec = parse_spec(text)
    if spec.kind == "openai":
        from cappy.sampling.endpoint import Endpoint

        return Endpoint(spec, config)
    if spec.kind == "recorded":
        from cappy.sampling.recorded import Recorded

        return Recorded(spec)
    generator = _load_local(text, spec)
    if work is not None:
        generator.use_store(work)
    return generator


def _load_local(text: str, spec: Spec) -> "LocalGenerator":
    from cappy.model_folder import open_model_folder

    _refuse_scorer(text, spec)
    if spec.kind == "vllm":
        from cappy.sampling.vllm_generator import VLLM

        inner = parse_spec(spec.name)
        pinned = inner.kind == "hub"
        folder = open_model_folder(hub_folder(inner) if pinned else _existing_folder(inner), pinned=pinned)
        return VLLM(text, folder, revision=inner.revision)
    if spec.kind == "builtin":
        from cappy.builtin import LLM_FOLDER, verify

        verify(LLM_FOLDER)
        return _load_transformers(text, open_model_folder(LLM_FOLDER, pinned=True))
    if spec.kind == "hub":
        return _load_transformers(text, open_model_folder(hub_folder(spec), pinned=True), revision=spec.revision)
    return _load_transformers(text, open_model_folder(_existing_folder(spec)))


def _existing_folder(spec: Spec) -> Path:
    if not Path(spec.name).exists():
        raise missing_generator(spec.name)
    return Path(spec.name)


def _refuse_scorer(text: str, spec: Spec) -> None:
    if spec.kind == "models" or text == "builtin:tiny":
        source = "the registry holds scorers" if spec.kind == "models" else "it is a scorer"
        raise ConfigError(
            f"{quote(text)}: {source}; choose a generator: builtin, a folder, hub:, vllm:, openai: or recorded:"
        )


def _load_transformers(name: str, folder: "ModelFolder", revision: str = "") -> "LocalGenerator":
    config = folder.config()
    if config.is_encoder_decoder:
        from cappy.sampling.architectures import Seq2Seq

        return Seq2Seq(name, folder, revision)
    architectures = config.architectures or []
    if architectures and not any(name.endswith(_CAUSAL_SUFFIXES) for name in architectures):
        raise _architecture_error(folder.path, ", ".join(architectures))
    from cappy.sampling.architectures import Causal

    return Causal(name, folder, revision)


def _architecture_error(folder: Path, architecture: str) -> ConfigError:
    return ConfigError(f"{folder}: {architecture} cannot generate text; choose an encoder-decoder or a causal LLM")


def check_generator(text: str, config: "EndpointConfig", decodings: Sequence["Decoding"] = ()) -> int:
    """Bytes that a run would download for a generator; raises ConfigError if it cannot be used.

    Checks in seconds what can be known without a paid request and without loading weights: the folder, the repository,
    or the endpoint's key, address and model. `decodings` are those of this generator.
    """
    from cappy.model_folder import read_tensor_sizes, refuse_pickles

    spec = parse_spec(text)
    if spec.kind == "openai":
        _check_endpoint(spec, config, decodings)
        return 0
    if spec.kind == "recorded":
        from cappy.sampling.recorded import Recorded

        Recorded(spec).check(decodings)
        return 0
    _refuse_scorer(text, spec)
    inner = parse_spec(spec.name) if spec.kind == "vllm" else spec
    if spec.kind == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ConfigError(f"{text}: vLLM is not installed; pip install vllm where there is a GPU")
    if inner.kind == "hub":
        return check_repository(inner)
    if inner.kind == "path":
        folder = _existing_folder(inner)
        refuse_pickles(folder)
        _refuse_classifier(folder)
        read_tensor_sizes(folder)
    return 0


def _refuse_classifier(folder: Path) -> None:
    """Raises an error for a folder without config.json, or whose architecture clearly has no language model's head."""
    path = folder / "config.json"
    if not path.is_file():
        raise FolderError(f"{folder}: has no config.json; give a folder that transformers saved")
    try:
        names = json.loads(path.read_bytes()).get("architectures")
    except (ValueError, AttributeError, RecursionError) as error:
        raise FolderError(f"{path}: is not a JSON object; download the folder again") from error
    for name in names if isinstance(names, list) else ():
        if str(name).endswith(("Classification", "ForMaskedLM", "ForQuestionAnswering")):
            raise _architecture_error(folder, str(name))


def _check_endpoint(spec: Spec, config: "EndpointConfig", decodings: Sequence["Decoding"]) -> None:
    """Raises ConfigError if the endpoint cannot be used: its decodings, key and address, and the model's name.

    Asks for the list of models, which costs nothing. An endpoint without such a list is not refused.
    """
    import openai

    from cappy.sampling.endpoint import Endpoint
    from cappy.sampling.endpoint.address import KEY_FILE_VARIABLE, KEY_VARIABLE, NO_KEY, base_address
    from cappy.sampling.endpoint.client import Clients, DeadlineExceededError
    from cappy.sampling.endpoint.faults import classify_error
    from cappy.sampling.endpoint.limits import MAX_LIST_BYTES

    endpoint = Endpoint(spec, replace(config, folder=None))
    try:
        endpoint.check(decodings)
    finally:
        endpoint.close()
    url = base_address(spec.url)
    clients = Clients(url, count=1, timeout=CHECK_SECONDS)
    host = urlsplit(url).hostname or ""
    if clients.key == NO_KEY and host.endswith(HOSTS_WITH_KEYS):
        remedy = f"set {KEY_VARIABLE}, or {KEY_FILE_VARIABLE} for a mounted file"
        raise ConfigError(f"{spec.text}: {host} needs a key; {remedy}")
    try:
        with clients.client(threading.Event()) as client:
            body = client.get("/models", max_bytes=MAX_LIST_BYTES)
    except (DeadlineExceededError, openai.APITimeoutError):
        LOGGER.warning(
            "%s: has not listed its models within %g s; sampling starts all the same", spec.text, CHECK_SECONDS
        )
        return
    except openai.OpenAIError as error:
        fault = classify_error(error, {})
        if isinstance(error, openai.APIConnectionError):
            raise ConfigError(f"{spec.text}: {fault.reason}; check the address, and that its server runs") from error
        # A key may be allowed to sample but not to list models.
        is_limited_key = isinstance(error, openai.APIStatusError) and "scope" in fault.reason.lower()
        if fault.kind == "abort" and not fault.only_if_unanswered and not is_limited_key:
            raise ConfigError(f"{spec.text}: {fault.reason}; {fault.remedy}") from error
        return
    finally:
        clients.close()
    if "api-version" not in url:  # Azure lists models, but requests name deployments.
        _refuse_unlisted_model(spec, body)


def _refuse_unlisted_model(spec: Spec, body: bytes) -> None:
    """Raises ConfigError if the body lists models, but neither this one nor one that its server may call so.

    Servers leave out a prefix (models/NAME) or a tag (NAME:latest); llama.cpp answers to any name.
    """
    from cappy.untrusted import read_json

    try:
        values = read_json(body)
    except (ValueError, RecursionError):
        return
    entries = values.get("data") if isinstance(values, dict) else None
    if not isinstance(entries, list) or (isinstance(values, dict) and values.get("has_more")):
        return
    names = [entry["id"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
    owners = {str(entry.get("owned_by")) for entry in entries if isinstance(entry, dict)}
    if not names or any("*" in name for name in names) or "llamacpp" in owners:
        return
    if not _names_of_model(spec.name) & {form for name in names for form in _names_of_model(name)}:
        first = ", ".join(quote(name, 80) for name in sorted(names)[:_NAMES_IN_ERROR])
        more = f" and {len(names) - _NAMES_IN_ERROR:,} more" if len(names) > _NAMES_IN_ERROR else ""
        raise ConfigError(
            f"{spec.text}: the endpoint has no model {quote(spec.name)}; its models: {first}{more} (--no-checks tries "
            "a model that it does not list)"
        )


def _names_of_model(name: str) -> set[str]:
    without_tag = name.lower().partition(":")[0]
    return {name.lower(), without_tag, without_tag.rpartition("/")[2]}
