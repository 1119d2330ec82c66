"""The sampling step: draws candidates for every instance from one or several LLMs."""

from pathlib import Path
from typing import TYPE_CHECKING

from cappy.errors import ConfigError, quote
from cappy.hub_client import hub_folder
from cappy.specs import Spec, parse_spec

if TYPE_CHECKING:
    from cappy.model_folder import ModelFolder
    from cappy.sampling.generators import EndpointConfig, Generator, LocalGenerator

__all__ = ["load_generator"]

_CAUSAL_SUFFIXES = ("ForCausalLM", "LMHeadModel")


def load_generator(text: str, config: "EndpointConfig | None" = None, *, work: Path | None = None) -> "Generator":
    """Loads the generator that a spec names; its `sample(instructions, decodings, seed=...)` draws candidates.

    `config` is used by an endpoint and includes the folder of its cached answers; any other generator stores its
    candidates in `work`. Raises ConfigError if the spec does not name a generator, or FolderError if its folder is not
    valid.
    """
    spec = parse_spec(text)
    if spec.kind == "openai":
        from cappy.sampling.endpoint import Endpoint

        return Endpoint(spec, config)
    generator = _load_local(text, spec)
    if work is not None:
        generator.use_store(work)
    return generator


def _load_local(text: str, spec: Spec) -> "LocalGenerator":
    from cappy.model_folder import open_model_folder

    if spec.kind == "models":
        raise ConfigError(
            f"{quote(text)}: the registry holds scorers; choose a generator: builtin, a folder, hub:, vllm: or openai:"
        )
    if spec.kind == "vllm":
        from cappy.sampling.vllm_generator import VLLM

        inner = parse_spec(spec.name)
        pinned = inner.kind == "hub"
        folder = open_model_folder(hub_folder(inner) if pinned else Path(inner.name), pinned=pinned)
        return VLLM(text, folder, revision=inner.revision)
    if spec.kind == "builtin":
        from cappy.builtin import LLM_FOLDER, verify

        verify(LLM_FOLDER)
        return _load_transformers(text, open_model_folder(LLM_FOLDER, pinned=True))
    if spec.kind == "hub":
        return _load_transformers(text, open_model_folder(hub_folder(spec), pinned=True), revision=spec.revision)
    return _load_transformers(text, open_model_folder(Path(spec.name)))


def _load_transformers(name: str, folder: "ModelFolder", revision: str = "") -> "LocalGenerator":
    config = folder.config()
    if config.is_encoder_decoder:
        from cappy.sampling.architectures import Seq2Seq

        return Seq2Seq(name, folder, revision)
    architectures = config.architectures or []
    if architectures and not any(name.endswith(_CAUSAL_SUFFIXES) for name in architectures):
        raise ConfigError(
            f"{folder.path}: {', '.join(architectures)} cannot generate text; choose an encoder-decoder or a causal LLM"
        )
    from cappy.sampling.architectures import Causal

    return Causal(name, folder, revision)
