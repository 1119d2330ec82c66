"""Sampling: candidates for every instance, from one LLM or several."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from cappy.config import DEFAULT_WORK, Location, Work, code_version, identity, settings
from cappy.errors import ConfigError, shown
from cappy.progress import Progress, silent
from cappy.records import Candidate, Instance, Manifest, read_manifest
from cappy.records.shard import ShardOf, parse_shard
from cappy.sampling.generators import SamplesAll, check_strategy
from cappy.sampling.strategies import Decoding, strategy

if TYPE_CHECKING:
    from cappy.sampling.generators import Generator

__all__ = ["SamplingConfig", "load_generator", "run"]


@settings
class SamplingConfig:
    """Candidates for a folder of instances."""

    source: Annotated[Location, Field(description="Folder of instances")]
    target: Annotated[Location, Field(description="Folder to write")]
    generator: Annotated[
        tuple[str, ...],
        Field(
            description="LLM to sample from: builtin, a folder, hub:org/name@revision, vllm:folder, "
            "openai:model@http://host/v1"
        ),
    ] = ()
    strategy: Annotated[
        str,
        Field(
            description="Which responses to draw: paper17, paper17-leaky, paper-pretrain, sampling8, endpoint8; "
            "decodings as beam4+topk40x4; or a file of them"
        ),
    ] = "paper17"
    seed: Annotated[int, Field(description="Seed of the draw")] = 0
    part_rows: Annotated[int, Field(ge=1, description="Instances per part; a killed run continues at a part")] = 64
    shard: ShardOf = ""
    work: Work = DEFAULT_WORK

    def __post_init__(self) -> None:
        check_strategy(self.generator, strategy(self.strategy))
        parse_shard(self.shard)


def load_generator(spec: str) -> "Generator":
    """The generator that a spec names: `sample(instructions, decoding, seed=...)` draws candidates from it."""
    from cappy.sampling import generators

    return generators.load_generator(spec)


def run(config: SamplingConfig, progress: Progress = silent) -> Manifest:
    """Samples for the instances of `source` into `target`; a killed run continues at the first unfinished part.

    Instances with choices need no samples. Without a generator the candidates that came with the instances stand.
    """
    from cappy.records.parts import process_folder
    from cappy.records.work import claim, finish

    parent = read_manifest(config.source)
    generators = [load_generator(spec) for spec in config.generator]
    decodings = strategy(config.strategy)

    def transform(part: list[Instance]) -> Iterator[Instance]:
        return sample(part, generators, decodings, seed=config.seed)

    revisions = {generator.name: generator.revision for generator in generators}

    # The file of decodings may change while its path stays.
    stated = identity(config) | {"decodings": [asdict(decoding) for decoding in decodings]}
    seen = 0

    def drawn(part: Sequence[Instance]) -> dict[str, int]:
        nonlocal seen
        before, seen = seen, sum(getattr(generator, "cut", 0) for generator in generators)
        sampled = sum(one.generator in revisions for instance in part for one in instance.candidates)
        return {"sampled": sampled, "cut": seen - before}

    with claim(config.work, "sampling", stated, [parent.hash, *revisions.values()]) as folder:
        parts = process_folder(
            config.source,
            folder,
            transform,
            rows=parse_shard(config.shard).rows(parent.rows),
            part_rows=config.part_rows,
            progress=progress,
            count=drawn,
        )
        manifest = Manifest(
            step="sampling",
            files=parts.files,
            config=stated,
            code=code_version(),
            seed=config.seed,
            generators=revisions,
            parents=(parent.hash,),
            metrics={"instances": parts.rows, "candidates": parts.candidates, **parts.counts},
        )
        return finish(folder, config.target, manifest)


def sample(
    part: Sequence[Instance], generators: Sequence["Generator"], decodings: Sequence[Decoding], *, seed: int
) -> Iterator[Instance]:
    """The instances with every generator's candidates appended, in order; equal arguments give equal candidates.

    What a generator on this machine draws does not depend on the part (see `LocalLLM`); an endpoint's seeds do.

    Instances with choices keep those as their candidates and learn how likely the first generator that knows finds
    each.
    """
    open_ended = [instance for instance in part if not instance.choices]
    bare = next((instance for instance in open_ended if not instance.candidates), None)
    if bare and not generators:
        remedy = "name an LLM with --generator, or give responses in the file"
        raise ConfigError(f"sampling: instance {shown(bare.instance_id)} has no candidate; {remedy}")
    added: dict[str, list[Candidate]] = {instance.instance_id: [] for instance in open_ended}
    prompts = [instance.instruction for instance in open_ended]
    for position, generator in enumerate(generators):
        own = [decoding for decoding in decodings if decoding.generator in (None, position)]
        for drawn in _drawn(generator, prompts, own, seed, [instance.instance_id for instance in open_ended]):
            for instance, candidates in zip(open_ended, drawn, strict=True):
                added[instance.instance_id] += candidates
    closed = _with_likelihoods([instance for instance in part if instance.choices], generators)
    for instance in part:
        if instance.choices:
            yield next(closed)
        else:
            yield replace(instance, candidates=(*instance.candidates, *added[instance.instance_id]))


def _drawn(
    generator: "Generator", prompts: Sequence[str], decodings: Sequence[Decoding], seed: int, ids: Sequence[str]
) -> Iterator[list[list[Candidate]]]:
    """For one decoding after another, or for all at once, the candidates of every prompt."""
    if not prompts or not decodings:
        return
    if isinstance(generator, SamplesAll):
        yield generator.sample_all(prompts, decodings, seed=_seed(seed, generator.name))
        return
    for decoding in decodings:
        yield generator.sample(prompts, decoding, seed=_seed(seed, generator.name, decoding.name, ids))


def _with_likelihoods(instances: Sequence[Instance], generators: Sequence["Generator"]) -> Iterator[Instance]:
    pairs = [(instance.instruction, candidate.response) for instance in instances for candidate in instance.candidates]
    known = (generator.likelihoods(pairs) for generator in generators) if pairs else iter(())
    found = next((likelihoods for likelihoods in known if likelihoods is not None), None)
    if found is None:
        yield from instances
        return
    likelihoods = iter(found)
    for instance in instances:
        told = zip(instance.candidates, itertools.islice(likelihoods, len(instance.candidates)), strict=True)
        yield replace(
            instance,
            candidates=tuple(
                replace(candidate, logprob_sum=total, logprob_mean=total / max(count, 1), num_tokens=count)
                for candidate, (total, count) in told
            ),
        )


def _seed(*parts: object) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFF_FFFF
