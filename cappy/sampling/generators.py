"""What a generator is, and how a spec becomes one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from cappy.errors import ConfigError, shown
from cappy.records import Candidate
from cappy.sampling.strategies import Decoding
from cappy.specs import hub_folder, parse_spec

_GENERATES = ("ForCausalLM", "LMHeadModel")


class Generator(Protocol):
    """An LLM that samples candidates.

    `name` is its spec and `revision` pins its weights (a hash or a commit; for an endpoint the model's own name).
    """

    name: str
    revision: str

    def sample(self, instructions: Sequence[str], decoding: Decoding, *, seed: int) -> list[list[Candidate]]:
        """`decoding.num_samples` candidates per instruction, in order; equal arguments draw equal candidates."""

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, int]] | None:
        """(sum of log-probabilities, number of tokens) of each given response, end token included; None if unknown."""


@runtime_checkable
class SamplesAll(Protocol):
    """A generator that does several decodings of an instruction together for less, and whose draws need no part.

    `sample_all` gives the candidates of all decodings, in their order, per instruction. What it draws for an
    instruction depends on the seed, the instruction and the decoding, not on the instructions beside it.
    """

    def sample_all(
        self, instructions: Sequence[str], decodings: Sequence[Decoding], *, seed: int
    ) -> list[list[Candidate]]: ...


def check_strategy(specs: Sequence[str], decodings: Sequence[Decoding]) -> None:
    """ConfigError for what can be known to fail before anything is loaded."""
    beams = next((decoding for decoding in decodings if decoding.num_beams > 1), None)
    for text in specs:
        if beams and parse_spec(text).kind == "vllm":
            raise ConfigError(f"{text}: vLLM does no beams here ({beams.name}); choose a --strategy without, as greedy")
    needed = max((decoding.generator + 1 for decoding in decodings if decoding.generator is not None), default=0)
    if specs and needed > len(specs):
        raise ConfigError(
            f"sampling: --strategy is for {needed} generators, got {len(specs)}; name each with --generator"
        )


def load_generator(text: str) -> Generator:
    """The generator that a spec names; ConfigError says which specs sample."""
    spec = parse_spec(text)
    if spec.kind == "openai":
        from cappy.sampling.endpoint import Endpoint

        return Endpoint(spec)
    if spec.kind == "models":
        raise ConfigError(
            f"{shown(text)}: the registry holds scorers; a generator is builtin, a folder, hub:, vllm: or openai:"
        )
    if spec.kind == "vllm":
        from cappy.sampling.vllm_generator import VLLM

        inner = parse_spec(spec.name)
        folder = hub_folder(inner) if inner.kind == "hub" else Path(inner.name)
        return VLLM(text, folder, revision=inner.revision)
    if spec.kind == "builtin":
        from cappy.builtin import LLM_FOLDER, verify

        verify(LLM_FOLDER)
        return _local(text, LLM_FOLDER)
    if spec.kind == "hub":
        return _local(text, hub_folder(spec), revision=spec.revision)
    return _local(text, Path(spec.name))


def _local(name: str, folder: Path, revision: str = "") -> Generator:
    from cappy.sampling.local import read_config

    config = read_config(folder)
    if config.is_encoder_decoder:
        from cappy.sampling.seq2seq import Seq2Seq

        return Seq2Seq(name, folder, revision)
    kinds = config.architectures or []
    if kinds and not any(kind.endswith(_GENERATES) for kind in kinds):
        raise ConfigError(
            f"{folder}: holds {', '.join(kinds)}, which generates nothing; a generator is an encoder-decoder or a "
            "causal LLM"
        )
    from cappy.sampling.causal import Causal

    return Causal(name, folder, revision)
