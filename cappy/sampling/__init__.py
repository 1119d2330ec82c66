"""Sampling: candidates for every instance, from one LLM or several."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cappy.sampling.generators import Generator
    from cappy.sampling.paid import Terms

__all__ = ["load_generator"]


def load_generator(spec: str, terms: "Terms | None" = None) -> "Generator":
    """The generator that a spec names: `sample(instructions, decoding, seed=...)` draws candidates from it.

    `terms` hold for an endpoint; without them it keeps no answers.
    """
    from cappy.sampling import generators

    return generators.load_generator(spec, terms)
