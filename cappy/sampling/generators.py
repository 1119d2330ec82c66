"""What a generator is, and how a spec becomes one."""

from collections.abc import Sequence
from typing import Protocol

from cappy.errors import ConfigError, shown
from cappy.records import Candidate
from cappy.sampling.paid import Terms
from cappy.sampling.strategies import Decoding
from cappy.specs import hub_folder, parse_spec


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


def load_generator(text: str, terms: Terms | None = None) -> Generator:
    """The generator that a spec names; ConfigError says which specs sample. `terms` are an endpoint's."""
    spec = parse_spec(text)
    if spec.kind == "openai":
        from cappy.sampling.endpoint import Endpoint

        return Endpoint(spec, terms)
    if spec.kind == "models":
        raise ConfigError(
            f"{shown(text)}: the registry holds scorers; a generator is builtin, a folder, hub: or openai:"
        )
    from cappy.sampling.seq2seq import Seq2Seq

    if spec.kind == "builtin":
        from cappy.builtin import LLM_FOLDER, verify

        verify(LLM_FOLDER)
        return Seq2Seq(text, LLM_FOLDER)
    if spec.kind == "hub":
        return Seq2Seq(text, hub_folder(spec), revision=spec.revision)
    return Seq2Seq(text, spec.name)
