"""The sampling step: draws candidates for a folder of instances from one or several LLMs."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from cappy.config import (
    ADVANCED,
    DEFAULT_WORK,
    RESULT_NEUTRAL,
    Fresh,
    Location,
    Renames,
    Work,
    fingerprint,
    result_settings,
    settings,
)
from cappy.errors import ConfigError, quote
from cappy.progress import Progress, silent
from cappy.reasoning import ReasoningFilter
from cappy.records import Candidate, Instance, Manifest, read_manifest
from cappy.records.work import ShardSetting, parse_shard, refuse_same_folder
from cappy.sampling import load_generator
from cappy.sampling.generators import (
    Api,
    EndpointConfig,
    Generator,
    OnCandidates,
    check_strategy,
    generator_seed,
    ignore_progress,
)
from cappy.sampling.statistics import (
    SamplingProgress,
    cautions,
    check_failures,
    count_failures,
    count_part,
    manifest_entries,
)
from cappy.sampling.store import FRESH_FOLDER
from cappy.sampling.strategies import (
    MAX_NEW_TOKENS_LIMIT,
    Decoding,
    check_decodings,
    decodings_of,
    default_length,
    default_strategy,
    parse_strategy,
)
from cappy.specs import parse_spec
from cappy.steps import step_version


@settings
class SamplingConfig:
    """A folder of instances, the LLMs to sample from, and how to sample."""

    RENAMED: ClassVar[Renames] = {
        "retries": "max_retries",
        "budget_requests": "max_total_requests",
        "budget_tokens": "max_total_tokens",
        "budget_money": "max_total_cost",
    }

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
            description="Responses to sample: paper17 (17, as in the paper), paper17-leaky (with the published code's "
            "top-k bug), paper-pretrain (5 from each of 2 LLMs), sampling8 (8), greedy (1), endpoint8 (8 from an API), "
            "an expression such as beam4+topk40x4, or a file. Default: endpoint8 for openai: and vllm:, else paper17"
        ),
    ] = ""
    max_new_tokens: Annotated[
        int,
        Field(
            ge=0,
            le=MAX_NEW_TOKENS_LIMIT,
            description="Maximum tokens of a response; 0: from the strategy, or 512 for openai: and 64 for others",
        ),
    ] = 0
    strip_reasoning: Annotated[
        bool,
        Field(description="Remove the reasoning (<think>...</think> and other markup) from each response"),
    ] = False
    seed: Annotated[int, Field(description="Seed of the random numbers")] = 0
    part_rows: Annotated[
        int, ADVANCED, Field(ge=1, description="Instances per part; a killed run resumes at the first unfinished part")
    ] = 64
    shard: ShardSetting = ""
    work: Work = DEFAULT_WORK
    fresh: Fresh = ""
    api: Annotated[Api, ADVANCED, Field(description="API of the endpoint: chat, or completions for a base model")] = (
        "chat"
    )
    extra: Annotated[
        tuple[Literal["top_k", "min_p", "min_tokens"], ...],
        ADVANCED,
        Field(
            description="Parameters outside OpenAI's API that the endpoint supports (vLLM: top_k, min_p, min_tokens)"
        ),
    ] = ()
    logprobs: Annotated[
        bool, ADVANCED, Field(description="Request log-probabilities from an endpoint; some models refuse them")
    ] = True
    max_failed: Annotated[
        float,
        RESULT_NEUTRAL,
        ADVANCED,
        Field(
            ge=0,
            le=1,
            description="Maximum share of a generator's candidates that may fail before the run ends; if above 0, the "
            "candidates of one instance are always allowed to fail; 1: no limit",
        ),
    ] = 0.1
    concurrency: Annotated[
        int, RESULT_NEUTRAL, Field(ge=1, le=1024, description="Concurrent requests to an endpoint")
    ] = 8
    requests_per_minute: Annotated[
        int, RESULT_NEUTRAL, ADVANCED, Field(ge=0, description="Maximum requests per minute; 0: no limit")
    ] = 0
    tokens_per_minute: Annotated[
        int,
        RESULT_NEUTRAL,
        ADVANCED,
        Field(ge=0, description="Maximum tokens per minute, input and output; 0: no limit"),
    ] = 0
    max_total_requests: Annotated[
        int, RESULT_NEUTRAL, ADVANCED, Field(ge=0, description="Maximum requests of this run; 0: no limit")
    ] = 0
    max_total_tokens: Annotated[
        int,
        RESULT_NEUTRAL,
        ADVANCED,
        Field(ge=0, description="Maximum tokens of this run, input and output; 0: no limit"),
    ] = 0
    max_total_cost: Annotated[
        float, RESULT_NEUTRAL, Field(ge=0, description="Maximum cost of this run; 0: no limit")
    ] = 0.0
    price_input: Annotated[float, RESULT_NEUTRAL, Field(ge=0, description="Price of a million input tokens")] = 0.0
    price_output: Annotated[float, RESULT_NEUTRAL, Field(ge=0, description="Price of a million output tokens")] = 0.0
    timeout: Annotated[float, RESULT_NEUTRAL, ADVANCED, Field(gt=0, description="Maximum seconds per request")] = 120.0
    max_retries: Annotated[
        int, RESULT_NEUTRAL, ADVANCED, Field(ge=0, le=100, description="Retries of a failed request")
    ] = 8

    def __post_init__(self) -> None:
        check_strategy(self.generator, self.decodings)
        parse_shard(self.shard)
        if self.max_total_cost and not (self.price_input or self.price_output):
            remedy = "give --price-input and --price-output, per million tokens"
            raise ConfigError(
                f"sampling: --max-total-cost: {self.max_total_cost:g} cannot be enforced without prices; {remedy}"
            )

    @property
    def decodings(self) -> tuple[Decoding, ...]:
        """The decodings of all generators; if they differ by generator, each has the position of its generator."""
        kinds = [parse_spec(text).kind for text in self.generator] or ["path"]
        by_generator = [self._decodings_of_kind(kind) for kind in kinds]
        if all(decodings == by_generator[0] for decodings in by_generator):
            return by_generator[0]
        positioned = [
            replace(decoding, generator=position)
            for position, decodings in enumerate(by_generator)
            for decoding in decodings_of(decodings, position)
        ]
        # Keep decodings of positions without a generator, so that `check_strategy` raises an error for them.
        unassigned = [decoding for decoding in by_generator[0] if (decoding.generator or 0) >= len(kinds)]
        return check_decodings([*positioned, *unassigned], "sampling: --strategy")

    def _decodings_of_kind(self, kind: str) -> tuple[Decoding, ...]:
        """The decodings for a generator of this kind."""
        decodings = parse_strategy(self.strategy or default_strategy(kind), self.max_new_tokens or default_length(kind))
        if not self.max_new_tokens:
            return decodings
        changed = [replace(decoding, max_new_tokens=self.max_new_tokens) for decoding in decodings]
        return check_decodings(changed, "sampling: --max-new-tokens")


def with_fresh_name(config: SamplingConfig, parent: Manifest) -> SamplingConfig:
    """Returns the config with `fresh` replaced by the name of the `--fresh` run that it continues, if there is one.

    So the candidates of that run are reused.
    """
    from cappy.records.work import fresh_name

    return replace(
        config, fresh=fresh_name(config.work, "sampling", _key_settings(config), [parent.hash], config.fresh)
    )


def _key_settings(config: SamplingConfig) -> dict[str, Any]:
    """The settings in the work's key, with the decodings: a file of decodings may change while its path stays."""
    return result_settings(config) | {"decodings": [asdict(decoding) for decoding in config.decodings]}


def _store_folder(config: SamplingConfig) -> Path:
    """The folder of stored candidates and answers; a `--fresh` run has its own."""
    return config.work / FRESH_FOLDER / config.fresh if config.fresh else config.work


def endpoint_config(config: SamplingConfig, parent: str = "") -> EndpointConfig:
    """The settings of this config's endpoints; `parent` is the hash of the source folder.

    The budget belongs to a run over that folder: it is shared by all shards and independent of the size of parts.
    """
    run_settings = {key: value for key, value in result_settings(config).items() if key not in ("shard", "part_rows")}
    return EndpointConfig(
        api=config.api,
        extra=config.extra,
        logprobs=config.logprobs,
        all_may_fail=config.max_failed >= 1,
        concurrency=config.concurrency,
        requests_per_minute=config.requests_per_minute,
        tokens_per_minute=config.tokens_per_minute,
        max_total_requests=config.max_total_requests,
        max_total_tokens=config.max_total_tokens,
        max_total_cost=config.max_total_cost,
        price_input=config.price_input,
        price_output=config.price_output,
        timeout=config.timeout,
        max_retries=config.max_retries,
        folder=_store_folder(config) / "answers",
        run=fingerprint("budget", run_settings, parent)[:24],
    )


def run(config: SamplingConfig, progress: Progress = silent) -> Manifest:
    """Draws candidates for the instances of `source` and writes them to `target`.

    A killed run resumes at the first unfinished part. The next run samples parts with failed candidates again, and
    reuses the stored answers. Instances with choices are not sampled for. Without a generator the instances keep their
    candidates. Raises GeneratorError if more than `max_failed` of a generator's candidates fail.
    """
    refuse_same_folder(config.source, config.target)
    parent = read_manifest(config.source)
    config = with_fresh_name(config, parent)
    endpoint_settings = endpoint_config(config, parent.hash)
    store_folder = _store_folder(config)
    with ExitStack() as stack:
        generators = [
            stack.enter_context(closing(load_generator(spec, endpoint_settings, work=store_folder)))
            for spec in config.generator
        ]
        for position, generator in enumerate(generators):
            generator.check(decodings_of(config.decodings, position))
        return _run(config, parent, generators, progress)


def _run(config: SamplingConfig, parent: Manifest, generators: list[Generator], progress: Progress) -> Manifest:
    from cappy.records.parts import process_folder
    from cappy.records.work import claim, finish

    decodings = config.decodings
    sampling_progress = SamplingProgress(progress, generators, decodings)

    reasoning = ReasoningFilter(strip=config.strip_reasoning)
    samples_per_instance = {
        generator.name: sum(decoding.num_samples for decoding in decodings_of(decodings, position))
        for position, generator in enumerate(generators)
    }
    counts_so_far: Counter[str] = Counter()

    def sample_part(part: list[Instance]) -> Iterator[Instance]:
        return sample(
            part,
            generators,
            decodings,
            seed=config.seed,
            on_candidates=sampling_progress.add_candidates,
            transform=reasoning,
        )

    def count(part: Sequence[Instance]) -> dict[str, int]:
        counts = count_part(part, generators) | count_failures(part, generators)
        if generators:
            counts["reasoning"] = reasoning.take_count()
        counts_so_far.update(counts)
        check_failures(counts_so_far, config.max_failed, samples_per_instance, parent.rows)
        return counts

    revisions = {generator.name: generator.revision for generator in generators}
    key_settings = _key_settings(config)
    inputs = [parent.hash, *revisions.values()]
    with claim(config.work, "sampling", key_settings, inputs, fresh=config.fresh) as folder, sampling_progress:
        parts = process_folder(
            config.source,
            folder,
            sample_part,
            rows=parse_shard(config.shard).rows(parent.rows),
            part_rows=config.part_rows,
            progress=sampling_progress,
            count=count,
            redo=lambda counts: counts.get("failed", 0) > 0,
        )
        check_failures(parts.counts, config.max_failed, samples_per_instance)
        metrics, facts = manifest_entries(parts.counts, endpoint_config(config))
        if contexts := [tokens for generator in generators if (tokens := getattr(generator, "context", None))]:
            facts["context"] = min(contexts)
        if messages := cautions(metrics, key_settings, facts):
            facts["cautions"] = messages
        manifest = Manifest(
            step="sampling",
            files=parts.files,
            config=key_settings,
            step_version=step_version("sampling"),
            seed=config.seed,
            generators=revisions,
            parents=(parent.hash,),
            metrics={"instances": parts.rows, "candidates": parts.candidates, **metrics},
            facts=facts,
        )
        return finish(folder, config.target, manifest)


def sample(
    part: Sequence[Instance],
    generators: Sequence[Generator],
    decodings: Sequence[Decoding],
    *,
    seed: int,
    on_candidates: OnCandidates = ignore_progress,
    transform: Callable[[Candidate], Candidate] = lambda candidate: candidate,
) -> Iterator[Instance]:
    """The instances with every generator's candidates appended, in order; equal arguments give equal candidates.

    The candidates of an instance do not depend on other instances. Instances with choices keep these as candidates,
    with likelihoods from the first generator that can compute them. `transform` is applied to each new candidate.
    Raises ConfigError for an instance that would have no candidate.
    """
    open_ended = [instance for instance in part if not instance.choices]
    without_candidate = next((instance for instance in open_ended if not instance.candidates), None)
    if without_candidate and not generators:
        remedy = "name an LLM with --generator, or give responses in the file"
        raise ConfigError(f"sampling: instance {quote(without_candidate.instance_id)} has no candidate; {remedy}")
    added: dict[str, list[Candidate]] = {instance.instance_id: [] for instance in open_ended}
    prompts = [instance.instruction for instance in open_ended]
    for position, generator in enumerate(generators):
        own_decodings = decodings_of(decodings, position)
        if not prompts or not own_decodings:
            continue
        sampled = generator.sample(
            prompts, own_decodings, seed=generator_seed(seed, generator.name), on_candidates=on_candidates
        )
        for instance, candidates in zip(open_ended, sampled, strict=True):
            added[instance.instance_id] += map(transform, candidates)
    with_choices = _with_likelihoods([instance for instance in part if instance.choices], generators)
    for instance in part:
        if instance.choices:
            yield next(with_choices)
        else:
            yield replace(instance, candidates=(*instance.candidates, *added[instance.instance_id]))


def _with_likelihoods(instances: Sequence[Instance], generators: Sequence[Generator]) -> Iterator[Instance]:
    pairs = [(instance.instruction, candidate.response) for instance in instances for candidate in instance.candidates]
    by_generator = (generator.likelihoods(pairs) for generator in generators) if pairs else iter(())
    first = next((likelihoods for likelihoods in by_generator if likelihoods is not None), None)
    if first is None:
        yield from instances
        return
    likelihoods = iter(first)
    for instance in instances:
        own_likelihoods = itertools.islice(likelihoods, len(instance.candidates))
        yield replace(
            instance,
            candidates=tuple(
                replace(candidate, logprob_sum=total, logprob_mean=total / max(count, 1), num_tokens=count)
                for candidate, (total, count) in zip(instance.candidates, own_likelihoods, strict=True)
            ),
        )
