"""What a generator is, and how a spec becomes one."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cappy.errors import ConfigError, shown
from cappy.model_folder import ModelFolder, open_model_folder
from cappy.records import Candidate
from cappy.records.instance import Status
from cappy.sampling.paid import Terms
from cappy.sampling.strategies import Decoding, share
from cappy.specs import Spec, hub_folder, parse_spec

if TYPE_CHECKING:
    from cappy.sampling.local import LocalGenerator

_GENERATES = ("ForCausalLM", "LMHeadModel")


class OnDrawn(Protocol):
    """Called by a generator as candidates come."""

    def __call__(self, candidates: int, /, *, begun: float = 0.0) -> None:
        """So many more are complete; those under way are `begun` candidates' worth of work, for an estimate."""


def unheard(candidates: int, /, *, begun: float = 0.0) -> None:
    """Nobody counts the candidates."""


class Generator(Protocol):
    """An LLM that samples candidates.

    `name` is its spec and `revision` pins its weights (a hash or a commit; for an endpoint the model's own name).
    """

    name: str
    revision: str

    def check(self, decodings: Sequence[Decoding]) -> None:
        """ConfigError for a decoding that it cannot do, before anything is drawn."""

    def sample(
        self,
        instructions: Sequence[str],
        decodings: Sequence[Decoding],
        *,
        seed: int,
        told: OnDrawn = unheard,
    ) -> list[list[Candidate]]:
        """The candidates of all decodings, in their order, per instruction; `told` hears of them as they come.

        What is drawn for an instruction depends on the seed, the instruction and the decoding, not on the instructions
        beside it.
        """

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, int]] | None:
        """(sum of log-probabilities, number of tokens) of each given response, end token included; None if unknown."""

    def tally(self) -> Mapping[str, int]:
        """Counts for the manifest of what the candidates since the last call took; forgets them."""

    def close(self) -> None:
        """Lets go of what it holds open; it is not used after that."""


def status_of(text: str, *, ended: bool) -> Status:
    """The status of a local LLM's response: `ended` says whether the LLM ended it, or the limit of tokens did."""
    if not text:
        return "empty"
    return "ok" if ended else "truncated"


def check_strategy(specs: Sequence[str], decodings: Sequence[Decoding]) -> None:
    """ConfigError for what can be known to fail before anything is loaded."""
    for position, text in enumerate(specs):
        if parse_spec(text).kind == "vllm":
            refuse_beams(text, share(decodings, position))
    twice = next((text for text in specs if specs.count(text) > 1), None)
    if twice:
        raise ConfigError(f"sampling: --generator {shown(twice)} stands twice, and would draw the same again; drop one")
    needed = max((decoding.generator + 1 for decoding in decodings if decoding.generator is not None), default=0)
    idle = next((text for position, text in enumerate(specs) if decodings and not share(decodings, position)), None)
    if idle and needed <= len(specs):
        raise ConfigError(
            f"sampling: --strategy leaves --generator {shown(idle)} without a decoding; it is for {needed} generators"
        )
    if specs and needed > len(specs):
        raise ConfigError(
            f"sampling: --strategy is for {needed} generators, got {len(specs)}; name each with --generator"
        )


def refuse_beams(name: str, decodings: Sequence[Decoding]) -> None:
    """ConfigError for a decoding by beams, which vLLM does not do here."""
    beams = next((decoding for decoding in decodings if decoding.num_beams > 1), None)
    if beams:
        raise ConfigError(f"{name}: vLLM does no beams here ({beams.name}); choose a --strategy without, as greedy")


def seed_of(seed: int, generator: str) -> int:
    """The seed of one generator of a run, below 2^31."""
    digest = hashlib.blake2b(repr((seed, generator)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFF_FFFF


def load_generator(text: str, terms: Terms | None = None, *, work: Path | None = None) -> Generator:
    """The generator that a spec names; ConfigError says which specs sample.

    `terms` are an endpoint's, with the folder of its answers; `work` keeps what all others draw.
    """
    spec = parse_spec(text)
    if spec.kind == "openai":
        from cappy.sampling.endpoint import Endpoint

        return Endpoint(spec, terms)
    generator = _load_local(text, spec)
    if work is not None:
        generator.keep_in(work)
    return generator


def _load_local(text: str, spec: Spec) -> "LocalGenerator":
    if spec.kind == "models":
        raise ConfigError(
            f"{shown(text)}: the registry holds scorers; a generator is builtin, a folder, hub:, vllm: or openai:"
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
        return _transformers(text, open_model_folder(LLM_FOLDER, pinned=True))
    if spec.kind == "hub":
        return _transformers(text, open_model_folder(hub_folder(spec), pinned=True), revision=spec.revision)
    return _transformers(text, open_model_folder(Path(spec.name)))


def _transformers(name: str, folder: ModelFolder, revision: str = "") -> "LocalGenerator":
    config = folder.config()
    if config.is_encoder_decoder:
        from cappy.sampling.seq2seq import Seq2Seq

        return Seq2Seq(name, folder, revision)
    kinds = config.architectures or []
    if kinds and not any(kind.endswith(_GENERATES) for kind in kinds):
        raise ConfigError(
            f"{folder.path}: holds {', '.join(kinds)}, which generates nothing; a generator is an encoder-decoder or a "
            "causal LLM"
        )
    from cappy.sampling.causal import Causal

    return Causal(name, folder, revision)
