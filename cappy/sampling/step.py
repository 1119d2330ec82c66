"""The sampling step: candidates for a folder of instances, from one LLM or several."""

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
    LOCATION,
    Fresh,
    Location,
    Renames,
    Work,
    fingerprint,
    identity,
    settings,
)
from cappy.errors import ConfigError, quote
from cappy.progress import Progress, silent
from cappy.reasoning import has_reasoning, strip_reasoning
from cappy.records import Candidate, Instance, Manifest, read_manifest
from cappy.records.work import ShardOf, parse_shard, refuse_same
from cappy.sampling import load_generator
from cappy.sampling.accounts import SamplingProgress, accounts, cautions, check_failures, count_part, failures
from cappy.sampling.generators import Api, EndpointConfig, Generator, OnDrawn, check_strategy, ignore_progress, seed_of
from cappy.sampling.store import FRESH_DRAWS
from cappy.sampling.strategies import (
    MAX_NEW_TOKENS_LIMIT,
    Decoding,
    check_decodings,
    default_length,
    default_strategy,
    share,
    strategy,
)
from cappy.specs import parse_spec
from cappy.steps import step_version


@settings
class SamplingConfig:
    """Candidates for a folder of instances."""

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
            description="Which responses to draw: paper17, paper17-leaky, paper-pretrain, sampling8, endpoint8; "
            "decodings as beam4+topk40x4; or a file of them; left out: endpoint8 for openai: and vllm:, else paper17"
        ),
    ] = ""
    max_new_tokens: Annotated[
        int,
        Field(
            ge=0,
            le=MAX_NEW_TOKENS_LIMIT,
            description="Longest response in tokens; 0: what the strategy says, else 512 for openai: and 64 for others",
        ),
    ] = 0
    strip_reasoning: Annotated[
        bool,
        Field(
            description="Keep of each response what follows its reasoning (<think>...</think> and other markup) alone"
        ),
    ] = False
    seed: Annotated[int, Field(description="Seed of the draw")] = 0
    part_rows: Annotated[
        int, ADVANCED, Field(ge=1, description="Instances per part; a killed run continues at a part")
    ] = 64
    shard: ShardOf = ""
    work: Work = DEFAULT_WORK
    fresh: Fresh = ""
    api: Annotated[
        Api, ADVANCED, Field(description="How an endpoint is asked: chat, or completions for a base model")
    ] = "chat"
    extra: Annotated[
        tuple[Literal["top_k", "min_p", "min_tokens"], ...],
        ADVANCED,
        Field(description="Knobs beyond OpenAI's that the endpoint takes, as vLLM's does: top_k, min_p, min_tokens"),
    ] = ()
    logprobs: Annotated[
        bool, ADVANCED, Field(description="Ask an endpoint for log-probabilities, which some of its models refuse")
    ] = True
    max_failed: Annotated[
        float,
        LOCATION,
        ADVANCED,
        Field(
            ge=0,
            le=1,
            description="Share of a generator's candidates that may fail, those of one instance always unless it is 0; "
            "above it the run ends; 1: never",
        ),
    ] = 0.1
    concurrency: Annotated[int, LOCATION, Field(ge=1, le=1024, description="Requests to an endpoint at a time")] = 8
    requests_per_minute: Annotated[
        int, LOCATION, ADVANCED, Field(ge=0, description="Most requests a minute; 0: no limit")
    ] = 0
    tokens_per_minute: Annotated[
        int, LOCATION, ADVANCED, Field(ge=0, description="Most tokens a minute, in and out; 0: no limit")
    ] = 0
    max_total_requests: Annotated[
        int, LOCATION, ADVANCED, Field(ge=0, description="Most requests of this run; 0: no limit")
    ] = 0
    max_total_tokens: Annotated[
        int, LOCATION, ADVANCED, Field(ge=0, description="Most tokens, in and out; 0: no limit")
    ] = 0
    max_total_cost: Annotated[float, LOCATION, Field(ge=0, description="Most that answers may cost; 0: no limit")] = 0.0
    price_input: Annotated[float, LOCATION, Field(ge=0, description="Price of a million tokens of instructions")] = 0.0
    price_output: Annotated[float, LOCATION, Field(ge=0, description="Price of a million tokens of responses")] = 0.0
    timeout: Annotated[float, LOCATION, ADVANCED, Field(gt=0, description="Seconds that a request may take")] = 120.0
    max_retries: Annotated[
        int, LOCATION, ADVANCED, Field(ge=0, le=100, description="Further attempts at a failed request")
    ] = 8

    def __post_init__(self) -> None:
        check_strategy(self.generator, self.decodings)
        parse_shard(self.shard)
        if self.max_total_cost and not (self.price_input or self.price_output):
            remedy = "give --price-input and --price-output, per million tokens"
            raise ConfigError(
                f"sampling: --max-total-cost: {self.max_total_cost:g} cannot be kept without prices; {remedy}"
            )

    @property
    def decodings(self) -> tuple[Decoding, ...]:
        """What is drawn, with the lengths that were asked for; those of one generator alone name its position."""
        kinds = [parse_spec(text).kind for text in self.generator] or ["path"]
        each = [self._decodings_of(kind) for kind in kinds]
        if all(one == each[0] for one in each):
            return each[0]
        positioned = [
            replace(decoding, generator=position)
            for position, one in enumerate(each)
            for decoding in share(one, position)
        ]
        # A strategy that names more positions than there are generators is refused by `check_strategy`.
        beyond = [one for one in each[0] if one.generator is not None and one.generator >= len(kinds)]
        return check_decodings([*positioned, *beyond], "sampling: --strategy")

    def _decodings_of(self, kind: str) -> tuple[Decoding, ...]:
        """What a generator of this kind would draw."""
        decodings = strategy(self.strategy or default_strategy(kind), self.max_new_tokens or default_length(kind))
        if not self.max_new_tokens:
            return decodings
        longer = [replace(decoding, max_new_tokens=self.max_new_tokens) for decoding in decodings]
        return check_decodings(longer, "sampling: --max-new-tokens")


def with_fresh_name(config: SamplingConfig, parent: Manifest) -> SamplingConfig:
    """The config under the name of the fresh start that its work is of, so that it finds what was drawn and paid."""
    from cappy.records.work import fresh_name

    return replace(
        config, fresh=fresh_name(config.work, "sampling", _key_settings(config), [parent.hash], config.fresh)
    )


def _key_settings(config: SamplingConfig) -> dict[str, Any]:
    """The settings that the work is named by: the file of decodings may change while its path stays."""
    return identity(config) | {"decodings": [asdict(decoding) for decoding in config.decodings]}


def _draws_folder(config: SamplingConfig) -> Path:
    """The folder that keeps what is drawn and answered: one of its own for a run that draws again (`--fresh`)."""
    return config.work / FRESH_DRAWS / config.fresh if config.fresh else config.work


def endpoint_config(config: SamplingConfig, parent: str = "") -> EndpointConfig:
    """How this config's endpoints are asked; the budget is that of one run over the folder whose hash is `parent`.

    Shards share the budget, and neither they nor the size of parts make another run of it.
    """
    computed = {name: value for name, value in identity(config).items() if name not in ("shard", "part_rows")}
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
        folder=_draws_folder(config) / "answers",
        run=fingerprint("budget", computed, parent)[:24],
    )


def run(config: SamplingConfig, progress: Progress = silent) -> Manifest:
    """Samples for the instances of `source` into `target`; a killed run continues at the first unfinished part.

    Parts with candidates that failed are sampled again by the next run, from answers that are kept where there are any.
    GeneratorError where more than `max_failed` of a generator's candidates fail.

    Instances with choices need no samples. Without a generator the candidates that came with the instances stand.
    """
    refuse_same(config.source, config.target)
    parent = read_manifest(config.source)
    config = with_fresh_name(config, parent)
    asking = endpoint_config(config, parent.hash)
    kept = _draws_folder(config)
    with ExitStack() as opened:
        generators = [
            opened.enter_context(closing(load_generator(spec, asking, work=kept))) for spec in config.generator
        ]
        for position, generator in enumerate(generators):
            generator.check(share(config.decodings, position))
        return _run(config, parent, generators, progress)


def _run(config: SamplingConfig, parent: Manifest, generators: list[Generator], progress: Progress) -> Manifest:
    from cappy.records.parts import process_folder
    from cappy.records.work import claim, finish

    decodings = config.decodings
    sampling_progress = SamplingProgress(progress, generators, decodings)

    reasoning = ReasoningReader(strip=config.strip_reasoning)
    each = {
        generator.name: sum(one.num_samples for one in share(decodings, position))
        for position, generator in enumerate(generators)
    }
    so_far: Counter[str] = Counter()

    def transform(part: list[Instance]) -> Iterator[Instance]:
        return sample(
            part, generators, decodings, seed=config.seed, on_drawn=sampling_progress.add_candidates, read=reasoning
        )

    def count(part: Sequence[Instance]) -> dict[str, int]:
        counts = count_part(part, generators) | failures(part, generators)
        if generators:
            counts["reasoning"] = reasoning.take_count()
        so_far.update(counts)
        check_failures(so_far, config.max_failed, each, parent.rows)
        return counts

    revisions = {generator.name: generator.revision for generator in generators}
    stated = _key_settings(config)
    inputs = [parent.hash, *revisions.values()]
    with claim(config.work, "sampling", stated, inputs, fresh=config.fresh) as folder, sampling_progress:
        parts = process_folder(
            config.source,
            folder,
            transform,
            rows=parse_shard(config.shard).rows(parent.rows),
            part_rows=config.part_rows,
            progress=sampling_progress,
            count=count,
            redo=lambda counts: counts.get("failed", 0) > 0,
        )
        check_failures(parts.counts, config.max_failed, each)
        metrics, facts = accounts(parts.counts, endpoint_config(config))
        if contexts := [tokens for one in generators if (tokens := getattr(one, "context", None))]:
            facts["context"] = min(contexts)
        if said := cautions(metrics, stated, facts):
            facts["cautions"] = said
        manifest = Manifest(
            step="sampling",
            files=parts.files,
            config=stated,
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
    on_drawn: OnDrawn = ignore_progress,
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
        raise ConfigError(f"sampling: instance {quote(bare.instance_id)} has no candidate; {remedy}")
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

    def take_count(self) -> int:
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
