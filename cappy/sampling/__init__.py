"""Sampling: candidates for every instance, from one LLM or several."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from cappy.config import DEFAULT_WORK, LOCATION, Location, Work, code_version, fingerprint, identity, settings
from cappy.errors import ConfigError, shown
from cappy.progress import Progress, silent
from cappy.records import Candidate, Instance, Manifest, read_manifest
from cappy.records.shard import ShardOf, parse_shard, refuse_same
from cappy.sampling.accounts import accounts, taken
from cappy.sampling.paid import Api, Paid, Terms
from cappy.sampling.strategies import Decoding, strategy

if TYPE_CHECKING:
    from cappy.sampling.generators import Generator

__all__ = ["SamplingConfig", "load_generator", "run", "terms_of"]


@settings
class SamplingConfig:
    """Candidates for a folder of instances."""

    source: Annotated[Location, Field(description="Folder of instances")]
    target: Annotated[Location, Field(description="Folder to write")]
    generator: Annotated[
        tuple[str, ...],
        Field(description="LLM to sample from: builtin, a folder, hub:org/name@revision, openai:model@http://host/v1"),
    ] = ()
    strategy: Annotated[str, Field(description="Which responses to draw: paper17, sampling8, greedy, endpoint8")] = (
        "paper17"
    )
    seed: Annotated[int, Field(description="Seed of the draw")] = 0
    part_rows: Annotated[int, Field(ge=1, description="Instances per part; a killed run continues at a part")] = 64
    shard: ShardOf = ""
    work: Work = DEFAULT_WORK
    api: Annotated[Api, Field(description="How an endpoint is asked: chat, or completions for a base model")] = "chat"
    extra: Annotated[
        tuple[Literal["top_k"], ...], Field(description="Knobs beyond OpenAI's that the endpoint takes: top_k (vLLM)")
    ] = ()
    concurrency: Annotated[int, LOCATION, Field(ge=1, le=1024, description="Requests to an endpoint at a time")] = 8
    requests_per_minute: Annotated[int, LOCATION, Field(ge=0, description="Most requests a minute; 0: no limit")] = 0
    tokens_per_minute: Annotated[
        int, LOCATION, Field(ge=0, description="Most tokens a minute, in and out; 0: no limit")
    ] = 0
    budget_requests: Annotated[int, LOCATION, Field(ge=0, description="Most requests of this run; 0: no limit")] = 0
    budget_tokens: Annotated[int, LOCATION, Field(ge=0, description="Most tokens, in and out; 0: no limit")] = 0
    budget_money: Annotated[float, LOCATION, Field(ge=0, description="Most that answers may cost; 0: no limit")] = 0.0
    price_input: Annotated[float, LOCATION, Field(ge=0, description="Price of a million tokens of instructions")] = 0.0
    price_output: Annotated[float, LOCATION, Field(ge=0, description="Price of a million tokens of responses")] = 0.0
    timeout: Annotated[float, LOCATION, Field(gt=0, description="Seconds that a request may take")] = 120.0
    retries: Annotated[int, LOCATION, Field(ge=0, le=100, description="Further attempts at a failed request")] = 8

    def __post_init__(self) -> None:
        strategy(self.strategy)
        parse_shard(self.shard)
        if self.budget_money and not (self.price_input or self.price_output):
            remedy = "give --price-input and --price-output, per million tokens"
            raise ConfigError(
                f"sampling: --budget-money: {self.budget_money:g} cannot be kept without prices; {remedy}"
            )


def load_generator(spec: str, terms: Terms | None = None) -> "Generator":
    """The generator that a spec names: `sample(instructions, decoding, seed=...)` draws candidates from it.

    `terms` hold for an endpoint; without them it keeps no answers.
    """
    from cappy.sampling import generators

    return generators.load_generator(spec, terms)


def terms_of(config: SamplingConfig, parent: str = "") -> Terms:
    """The terms of the config's endpoints; the budget is that of one run over the folder whose hash is `parent`.

    Shards share the budget, and neither they nor the size of parts make another run of it.
    """
    computed = {name: value for name, value in identity(config).items() if name not in ("shard", "part_rows")}
    return Terms(
        api=config.api,
        extra=config.extra,
        concurrency=config.concurrency,
        requests_per_minute=config.requests_per_minute,
        tokens_per_minute=config.tokens_per_minute,
        budget_requests=config.budget_requests,
        budget_tokens=config.budget_tokens,
        budget_money=config.budget_money,
        price_input=config.price_input,
        price_output=config.price_output,
        timeout=config.timeout,
        retries=config.retries,
        folder=config.work / "answers",
        run=fingerprint("budget", computed, parent)[:24],
    )


def run(config: SamplingConfig, progress: Progress = silent) -> Manifest:
    """Samples for the instances of `source` into `target`; a killed run continues at the first unfinished part.

    Instances with choices need no samples. Without a generator the candidates that came with the instances stand.
    """
    from cappy.records.parts import process_folder
    from cappy.records.work import claim, finish

    refuse_same(config.source, config.target)
    parent = read_manifest(config.source)
    terms = terms_of(config, parent.hash)
    generators = [load_generator(spec, terms) for spec in config.generator]
    paid = [generator for generator in generators if isinstance(generator, Paid)]
    decodings = strategy(config.strategy)
    for generator in paid:
        generator.check(decodings)

    def transform(part: list[Instance]) -> Iterator[Instance]:
        return sample(part, generators, decodings, seed=config.seed)

    revisions = {generator.name: generator.revision for generator in generators}

    def drawn(part: Sequence[Instance]) -> dict[str, int]:
        sampled = sum(one.generator in revisions for instance in part for one in instance.candidates)
        return {"sampled": sampled, **taken(part, paid)}

    with claim(config.work, "sampling", identity(config), [parent.hash, *revisions.values()]) as folder:
        parts = process_folder(
            config.source,
            folder,
            transform,
            rows=parse_shard(config.shard).rows(parent.rows),
            part_rows=config.part_rows,
            progress=progress,
            count=drawn,
        )
        metrics, facts = accounts(parts.counts, terms)
        manifest = Manifest(
            step="sampling",
            files=parts.files,
            config=identity(config),
            code=code_version(),
            seed=config.seed,
            generators=revisions,
            parents=(parent.hash,),
            metrics={"instances": parts.rows, "candidates": parts.candidates, **metrics},
            facts=facts,
        )
        return finish(folder, config.target, manifest)


def sample(
    part: Sequence[Instance], generators: Sequence["Generator"], decodings: Sequence[Decoding], *, seed: int
) -> Iterator[Instance]:
    """The instances with every generator's candidates appended, in order; equal arguments give equal candidates.

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
    for generator in generators:
        if isinstance(generator, Paid):
            for instance, drawn in zip(open_ended, generator.sample_all(prompts, decodings, seed=seed), strict=True):
                added[instance.instance_id] += drawn
            continue
        for decoding in decodings:
            draw = _seed(seed, generator.name, decoding.name, [instance.instance_id for instance in open_ended])
            for instance, drawn in zip(open_ended, generator.sample(prompts, decoding, seed=draw), strict=True):
                added[instance.instance_id] += drawn
    closed = _with_likelihoods([instance for instance in part if instance.choices], generators)
    for instance in part:
        if instance.choices:
            yield next(closed)
        else:
            yield replace(instance, candidates=(*instance.candidates, *added[instance.instance_id]))


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
