"""Estimates requests, tokens, time and cost of a sampling run before its first request (`--estimate`)."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, TypeAdapter

from cappy.records import Instance, read, read_manifest
from cappy.records.work import parse_shard
from cappy.sampling.generators import CHARACTERS_PER_TOKEN, EndpointConfig, estimate_tokens
from cappy.sampling.strategies import Decoding, decodings_of
from cappy.specs import parse_spec
from cappy.untrusted import JSON

if TYPE_CHECKING:
    from cappy.sampling.step import SamplingConfig

SECONDS_PER_REQUEST = 0.5
TOKENS_PER_SECOND = 50
"""Assumed speed of an endpoint; `describe` prints both values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Upper bounds for one generator: one request per sample, and every response as long as allowed.

    The `fewest_*` values apply to an endpoint that supports `n`. `answered` candidates are cached from an earlier run
    or equal to others, and need no request. `minutes` is the longest of the times at the assumed speed and at each
    limit per minute.
    A generator on this machine (`is_endpoint` is false) has no requests, minutes or cost.
    """

    generator: str
    is_endpoint: Annotated[bool, Field(serialization_alias="paid")]
    instances: int
    candidates: int
    answered: int = 0
    requests: int = 0
    fewest_requests: int = 0
    input_tokens: int = 0
    fewest_input_tokens: int = 0
    output_tokens: int = 0
    minutes: float = 0.0
    cost: float = 0.0
    fewest_cost: float = 0.0


def estimate_requests(
    generator: str,
    samples: list[tuple[str, Decoding]],
    config: EndpointConfig,
    *,
    instances: int,
    candidates: int,
) -> Estimate:
    """The estimate for an endpoint; `samples` are the (instruction, decoding) pairs without a cached answer."""
    tokens = {text: estimate_tokens(text) for text in {text for text, _ in samples}}
    distinct_samples = set(samples)
    input_tokens = sum(tokens[text] for text, _ in samples)
    fewest_input_tokens = sum(tokens[text] for text, _ in distinct_samples)
    output_tokens = sum(decoding.max_new_tokens for _, decoding in samples)
    assumed_minutes = (len(samples) * SECONDS_PER_REQUEST + output_tokens / TOKENS_PER_SECOND) / config.concurrency / 60
    rates = ((len(samples), config.requests_per_minute), (input_tokens + output_tokens, config.tokens_per_minute))
    return Estimate(
        generator=generator,
        is_endpoint=True,
        instances=instances,
        candidates=candidates,
        answered=candidates - len(samples),
        requests=len(samples),
        fewest_requests=len(distinct_samples),
        input_tokens=input_tokens,
        fewest_input_tokens=fewest_input_tokens,
        output_tokens=output_tokens,
        minutes=max([assumed_minutes, *(amount / limit for amount, limit in rates if limit)]),
        cost=config.cost(input_tokens, output_tokens),
        fewest_cost=config.cost(fewest_input_tokens, output_tokens),
    )


def estimate(config: "SamplingConfig") -> list[Estimate]:
    """Estimates the run of this config, per generator, without sending requests or loading a model.

    Raises ConfigError for a decoding that an endpoint does not support, and for samples that are not recorded, as the
    run itself would.
    """
    from cappy.sampling.recorded import Recorded, check_recorded
    from cappy.sampling.step import with_fresh_name

    manifest = read_manifest(config.source)
    specs = [parse_spec(text) for text in config.generator]
    recorded = [Recorded(spec) if spec.kind == "recorded" else None for spec in specs]
    check_recorded(config.source, manifest, recorded, config.decodings, exact=bool(config.strategy))
    rows = parse_shard(config.shard).rows(manifest.rows)
    return estimate_instances(with_fresh_name(config, manifest), read(config.source, rows=rows), parent=manifest.hash)


def estimate_instances(config: "SamplingConfig", instances: Iterable[Instance], *, parent: str = "") -> list[Estimate]:
    """The estimate of this config for these instances instead of those of its source, whose hash is `parent`."""
    from cappy.sampling.endpoint import Endpoint
    from cappy.sampling.generators import generator_seed
    from cappy.sampling.recorded import Recorded
    from cappy.sampling.step import endpoint_config

    instructions = list(_sampled_instructions(instances))
    decodings = config.decodings
    endpoint_settings = endpoint_config(config, parent)
    specs = [parse_spec(text) for text in config.generator]
    recorded = [Recorded(spec) if spec.kind == "recorded" else None for spec in specs]
    estimates = []
    for position, (text, spec) in enumerate(zip(config.generator, specs, strict=True)):
        own_decodings = decodings_of(decodings, position)
        candidates = len(instructions) * sum(decoding.num_samples for decoding in own_decodings)
        if spec.kind == "openai":
            endpoint = Endpoint(spec, endpoint_settings)
            endpoint.check(own_decodings)
            samples = endpoint.pending_samples(instructions, own_decodings, seed=generator_seed(config.seed, text))
            endpoint.close()
            estimates.append(
                estimate_requests(text, samples, endpoint_settings, instances=len(instructions), candidates=candidates)
            )
        else:
            if (generator := recorded[position]) is not None:
                generator.check_prompts(instructions, own_decodings, exact=bool(config.strategy))
                candidates = generator.count(instructions, own_decodings)
            estimates.append(
                Estimate(generator=text, is_endpoint=False, instances=len(instructions), candidates=candidates)
            )
    return estimates


def _sampled_instructions(instances: Iterable[Instance]) -> Iterator[str]:
    """The instructions of instances without choices, the only ones that are sampled for."""
    return (instance.instruction for instance in instances if not instance.choices)


def to_values(estimates: list[Estimate]) -> list[dict[str, JSON]]:
    """The estimates as JSON values."""
    values: list[dict[str, JSON]] = TypeAdapter(list[Estimate]).dump_python(estimates, mode="json", by_alias=True)
    return values


def describe(estimates: list[Estimate], config: EndpointConfig) -> str:
    """The estimates as text, several lines for each generator."""
    return "\n".join(line for estimate in estimates for line in _describe_estimate(estimate, config))


def _describe_estimate(estimate: Estimate, config: EndpointConfig) -> Iterator[str]:
    yield f"{estimate.generator}: {estimate.candidates:,} candidates for {estimate.instances:,} instances"
    if not estimate.is_endpoint:
        is_recorded = parse_spec(estimate.generator).kind == "recorded"
        yield f"  {'reads recorded samples' if is_recorded else 'runs here'}: no requests, no cost"
        return
    if estimate.answered:
        yield f"  answered   {estimate.answered:,} are cached or equal to others and need no request"
    yield f"  requests   {_format_range(f'{estimate.requests:,}', f'{estimate.fewest_requests:,}')}"
    input_tokens = _format_range(f"{estimate.input_tokens:,}", f"{estimate.fewest_input_tokens:,}")
    yield (
        f"  tokens     in {input_tokens}, out at most {estimate.output_tokens:,} "
        f"({CHARACTERS_PER_TOKEN} characters per token)"
    )
    limits = {"--requests-per-minute": config.requests_per_minute, "--tokens-per-minute": config.tokens_per_minute}
    limits_text = " and ".join(f"{name} {limit:,}" for name, limit in limits.items() if limit)
    yield (
        f"  minutes    about {math.ceil(estimate.minutes):,} at most, assuming {SECONDS_PER_REQUEST:g} s per request, "
        f"{TOKENS_PER_SECOND} tokens/s and {config.concurrency} at a time{limits_text and f', with {limits_text}'}"
    )
    if config.price_input or config.price_output:
        yield f"  cost       {_format_range(f'{estimate.cost:,.2f}', f'{estimate.fewest_cost:,.2f}')}"
    else:
        yield "  cost       unknown; set --price-input and --price-output (per million tokens)"


def _format_range(maximum: str, minimum: str) -> str:
    return maximum if maximum == minimum else f"{maximum} at most, {minimum} if the endpoint supports n"
