"""Candidates from generators onto instances."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from cappy.errors import ConfigError, shown
from cappy.reasoning import has_reasoning, strip_reasoning
from cappy.records import Candidate, Instance
from cappy.sampling.generators import Generator, OnDrawn, ignore_drawn, seed_of
from cappy.sampling.strategies import Decoding, share


def sample(
    part: Sequence[Instance],
    generators: Sequence[Generator],
    decodings: Sequence[Decoding],
    *,
    seed: int,
    on_drawn: OnDrawn = ignore_drawn,
    read: Callable[[Candidate], Candidate] = lambda candidate: candidate,
) -> Iterator[Instance]:
    """The instances with every generator's candidates appended, in order; equal arguments give equal candidates.

    What is drawn for an instance does not depend on the others. Instances with choices keep those as their candidates
    and learn how likely the first generator that knows finds each. ConfigError for an instance that would have no
    candidate at all. `read` is applied to each candidate that was drawn.
    """
    open_ended = [instance for instance in part if not instance.choices]
    bare = next((instance for instance in open_ended if not instance.candidates), None)
    if bare and not generators:
        remedy = "name an LLM with --generator, or give responses in the file"
        raise ConfigError(f"sampling: instance {shown(bare.instance_id)} has no candidate; {remedy}")
    added: dict[str, list[Candidate]] = {instance.instance_id: [] for instance in open_ended}
    prompts = [instance.instruction for instance in open_ended]
    for position, generator in enumerate(generators):
        own = share(decodings, position)
        if not prompts or not own:
            continue
        drawn = generator.sample(prompts, own, seed=seed_of(seed, generator.name), on_drawn=on_drawn)
        for instance, candidates in zip(open_ended, drawn, strict=True):
            added[instance.instance_id] += map(read, candidates)
    closed = _with_likelihoods([instance for instance in part if instance.choices], generators)
    for instance in part:
        if instance.choices:
            yield next(closed)
        else:
            yield replace(instance, candidates=(*instance.candidates, *added[instance.instance_id]))


class ReasoningReader:
    """Counts the candidates that hold reasoning, and removes it with `strip`."""

    def __init__(self, *, strip: bool) -> None:
        self._strip = strip
        self._count = 0

    def __call__(self, candidate: Candidate) -> Candidate:
        """The candidate; with `strip` its answer alone (`empty` if there is none), without the whole's likelihood."""
        if not has_reasoning(candidate.response):
            return candidate
        self._count += 1
        if not self._strip:
            return candidate
        response = strip_reasoning(candidate.response)
        status = candidate.status if response or not candidate.selectable else "empty"
        return replace(
            candidate, response=response, status=status, logprob_sum=None, logprob_mean=None, num_tokens=None
        )

    def counted(self) -> int:
        """How many held reasoning since the last call."""
        count, self._count = self._count, 0
        return count


def _with_likelihoods(instances: Sequence[Instance], generators: Sequence[Generator]) -> Iterator[Instance]:
    pairs = [(instance.instruction, candidate.response) for instance in instances for candidate in instance.candidates]
    by_generator = (generator.likelihoods(pairs) for generator in generators) if pairs else iter(())
    first = next((likelihoods for likelihoods in by_generator if likelihoods is not None), None)
    if first is None:
        yield from instances
        return
    likelihoods = iter(first)
    for instance in instances:
        known = zip(instance.candidates, itertools.islice(likelihoods, len(instance.candidates)), strict=True)
        yield replace(
            instance,
            candidates=tuple(
                replace(candidate, logprob_sum=total, logprob_mean=total / max(count, 1), num_tokens=count)
                for candidate, (total, count) in known
            ),
        )
