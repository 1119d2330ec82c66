"""What a run of sampling would take, before the first paid request."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cappy.records import Instance, read, read_manifest
from cappy.records.work import parse_shard
from cappy.sampling.generators import CHARACTERS_PER_TOKEN, EndpointConfig, estimate_tokens
from cappy.sampling.strategies import Decoding, decodings_of
from cappy.specs import parse_spec

if TYPE_CHECKING:
    from cappy.sampling.step import SamplingConfig

SECONDS_PER_REQUEST = 0.5
TOKENS_PER_SECOND = 50
"""Guesses of how an endpoint answers, where nothing was measured; the text names them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What one generator is asked for, at most: each response as long as it may be, its own request for each.

    The `fewest` numbers are those of an endpoint that takes `n`. `answered` candidates came in an earlier run and are
    not asked for again. `minutes` is the longest of the limits per minute and the guessed speed; a generator on this
    machine (`paid` false) has no requests, no minutes and no cost.
    """

    generator: str
    paid: bool
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
    """The estimate for these samples, those that nobody answered yet, of an endpoint with this config."""
    tokens = {text: estimate_tokens(text) for text in {text for text, _ in samples}}
    questions = set(samples)
    input_tokens = sum(tokens[text] for text, _ in samples)
    fewest_input_tokens = sum(tokens[text] for text, _ in questions)
    output_tokens = sum(decoding.max_new_tokens for _, decoding in samples)
    guess = (len(samples) * SECONDS_PER_REQUEST + output_tokens / TOKENS_PER_SECOND) / config.concurrency / 60
    rates = ((len(samples), config.requests_per_minute), (input_tokens + output_tokens, config.tokens_per_minute))
    return Estimate(
        generator=generator,
        paid=True,
        instances=instances,
        candidates=candidates,
        answered=candidates - len(samples),
        requests=len(samples),
        fewest_requests=len(questions),
        input_tokens=input_tokens,
        fewest_input_tokens=fewest_input_tokens,
        output_tokens=output_tokens,
        minutes=max([guess, *(amount / limit for amount, limit in rates if limit)]),
        cost=config.cost(input_tokens, output_tokens),
        fewest_cost=config.cost(fewest_input_tokens, output_tokens),
    )


def estimate(config: "SamplingConfig") -> list[Estimate]:
    """What the config's run takes of each generator; nothing is asked, no model is loaded.

    ConfigError for a decoding that an endpoint cannot do, as the run itself would say it.
    """
    from cappy.sampling.endpoint import Endpoint
    from cappy.sampling.generators import generator_seed
    from cappy.sampling.step import endpoint_config, with_fresh_name

    manifest = read_manifest(config.source)
    config = with_fresh_name(config, manifest)
    rows = parse_shard(config.shard).rows(manifest.rows)
    instructions = list(_instructions(read(config.source, rows=rows)))
    decodings = config.decodings
    asking = endpoint_config(config, manifest.hash)
    estimates = []
    for position, text in enumerate(config.generator):
        own = decodings_of(decodings, position)
        candidates = len(instructions) * sum(decoding.num_samples for decoding in own)
        spec = parse_spec(text)
        if spec.kind == "openai":
            endpoint = Endpoint(spec, asking)
            endpoint.check(own)
            samples = endpoint.pending_samples(instructions, own, seed=generator_seed(config.seed, text))
            endpoint.close()
            estimates.append(
                estimate_requests(text, samples, asking, instances=len(instructions), candidates=candidates)
            )
        else:
            estimates.append(Estimate(generator=text, paid=False, instances=len(instructions), candidates=candidates))
    return estimates


def _instructions(instances: Iterator[Instance]) -> Iterator[str]:
    """Of the instances that need samples; those with choices have their candidates."""
    return (instance.instruction for instance in instances if not instance.choices)


def describe(estimates: list[Estimate], config: EndpointConfig) -> str:
    """For a person: each generator with what it takes, a line each."""
    return "\n".join(line for one in estimates for line in _describe_estimate(one, config))


def _describe_estimate(one: Estimate, config: EndpointConfig) -> Iterator[str]:
    yield f"{one.generator}: {one.candidates:,} candidates for {one.instances:,} instances"
    if not one.paid:
        yield "  runs here: no requests, no cost"
        return
    if one.answered:
        yield f"  answered   {one.answered:,} are answered already, or equal to others, and not asked for again"
    yield f"  requests   {_format_range(f'{one.requests:,}', f'{one.fewest_requests:,}')}"
    yield (
        f"  tokens     in {_format_range(f'{one.input_tokens:,}', f'{one.fewest_input_tokens:,}')}, out at most "
        f"{one.output_tokens:,} ({CHARACTERS_PER_TOKEN} characters a token)"
    )
    limits = {"--requests-per-minute": config.requests_per_minute, "--tokens-per-minute": config.tokens_per_minute}
    stated = " and ".join(f"{name} {limit:,}" for name, limit in limits.items() if limit)
    yield (
        f"  minutes    about {math.ceil(one.minutes):,} at most, by {SECONDS_PER_REQUEST:g} s a request and "
        f"{TOKENS_PER_SECOND} tokens/s (a guess), {config.concurrency} at a time{stated and f', and {stated}'}"
    )
    if config.price_input or config.price_output:
        yield f"  cost       {_format_range(f'{one.cost:,.2f}', f'{one.fewest_cost:,.2f}')}"
    else:
        yield "  cost       give --price-input and --price-output, per million tokens, to see it"


def _format_range(most: str, fewest: str) -> str:
    return most if most == fewest else f"{most} at most, {fewest} if the endpoint takes n"
