"""The sampling step: draws candidates for a folder of instances from one or several LLMs."""

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
from cappy.sampling import (
    Concurrency,
    MaxTotalCost,
    MaxTotalRequests,
    MaxTotalTokens,
    PriceInput,
    PriceOutput,
    load_generator,
)
from cappy.sampling.generators import (
    Api,
    EndpointConfig,
    Generator,
    OnCandidates,
    check_strategy,
    generator_seed,
    ignore_progress,
    with_likelihoods,
)
from cappy.sampling.recorded import check_recorded, recorded_decodings, refuse_max_new_tokens
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
from cappy.specs import Spec, parse_spec
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
            "openai:model@http://host/v1; or recorded:FILE, samples that an LLM gave earlier"
        ),
    ] = ()
    strategy: Annotated[
        str,
        Field(
            description="Responses to sample: paper17 (17, as in the paper), paper17-leaky (with the published code's "
            "top-k bug), paper-pretrain (5 from each of 2 LLMs), sampling8 (8), greedy (1), endpoint8 (8 from an API), "
            "an expression such as beam4+topk40x4, or a file. Default: endpoint8 for openai: and vllm:, all samples of "
            "recorded:, else greedy+paper17"
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
    concurrency: Concurrency = 8
    requests_per_minute: Annotated[
        int, RESULT_NEUTRAL, ADVANCED, Field(ge=0, description="Maximum requests per minute; 0: no limit")
    ] = 0
    tokens_per_minute: Annotated[
        int,
        RESULT_NEUTRAL,
        ADVANCED,
        Field(ge=0, description="Maximum tokens per minute, input and output; 0: no limit"),
    ] = 0
    max_total_requests: MaxTotalRequests = 0
    max_total_tokens: MaxTotalTokens = 0
    max_total_cost: MaxTotalCost = 0.0
    price_input: PriceInput = 0.0
    price_output: PriceOutput = 0.0
    timeout: Annotated[float, RESULT_NEUTRAL, ADVANCED, Field(gt=0, description="Maximum seconds per request")] = 120.0
    max_retries: Annotated[
        int, RESULT_NEUTRAL, ADVANCED, Field(ge=0, le=100, description="Retries of a failed request")
    ] = 8

    def __post_init__(self) -> None:
        refuse_max_new_tokens(self.generator, self.max_new_tokens)
        # A file of samples may be on the volume of a cluster, where only the step can read it.
        reads_file = not self.strategy and any(parse_spec(text).kind == "recorded" for text in self.generator)
        check_strategy(self.generator, () if reads_file else self.decodings)
        parse_shard(self.shard)
        if self.max_total_cost and not (self.price_input or self.price_output):
            remedy = "give --price-input and --price-output, per million tokens"
            raise ConfigError(
                f"sampling: --max-total-cost: {self.max_total_cost:g} cannot be enforced without prices; {remedy}"
            )

    @property
    def decodings(self) -> tuple[Decoding, ...]:
        """The decodings of all generators; if they differ by generator, each has the position of its generator.

        Without a strategy, those of recorded samples are read from their file.
        """
        specs = [parse_spec(text) for text in self.generator]
        by_generator = [self._decodings_of(spec) for spec in specs] or [self._decodings_of_kind("path")]
        if all(decodings == by_generator[0] for decodings in by_generator):
            return by_generator[0]
        positioned = [
            replace(decoding, generator=position)
            for position, decodings in enumerate(by_generator)
            for decoding in decodings_of(decodings, position)
        ]
        # Keep decodings of positions without a generator, so that `check_strategy` raises an error for them.
        unassigned = [decoding for decoding in by_generator[0] if (decoding.generator or 0) >= len(by_generator)]
        return check_decodings([*positioned, *unassigned], "sampling: --strategy")

    def _decodings_of(self, spec: Spec) -> tuple[Decoding, ...]:
        is_recorded = spec.kind == "recorded" and not self.strategy
        return recorded_decodings(spec) if is_recorded else self._decodings_of_kind(spec.kind)

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
        decodings = config.decodings
        messages = check_recorded(config.source, parent, generators, decodings, exact=bool(config.strategy))
        for position, generator in enumerate(generators):
            generator.check(decodings_of(decodings, position))
        return _run(config, parent, generators, messages, progress)


def _run(
    config: SamplingConfig, parent: Manifest, generators: list[Generator], messages: list[str], progress: Progress
) -> Manifest:
    """Samples; `messages` are cautions from the checks before."""
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
        if messages:
            facts["recorded"] = messages
        if all_cautions := cautions(metrics, key_settings, facts):
            facts["cautions"] = all_cautions
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
    with_choices = with_likelihoods([instance for instance in part if instance.choices], generators)
    for instance in part:
        if instance.choices:
            yield next(with_choices)
        else:
            yield replace(instance, candidates=(*instance.candidates, *added[instance.instance_id]))
