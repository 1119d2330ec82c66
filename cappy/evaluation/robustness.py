"""Probes: does the scorer read the instruction, does it favour length, templates, an order? One number each."""

from collections.abc import Iterator, Sequence

import numpy as np

from cappy.evaluation.findings import Probe, TaskRow
from cappy.pages.words import percent
from cappy.selection.pools import Pool, Score, Values, Vector, picked

NUM_BLANKED = 200
NUM_REPEATED = 32
BLANK = " "


def probes(pools: Sequence[Pool], scores: Values, score: Score, tasks: Sequence[TaskRow], seed: int) -> list[Probe]:
    """Every probe that these pools allow."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(pools))[:NUM_BLANKED])
    found = [
        _response_only([pools[index] for index in chosen], [scores[index] for index in chosen], score),
        _length(pools, scores),
        *_templates(tasks),
        _order(pools, scores, score),
    ]
    return [probe for probe in found if probe is not None]


def _response_only(pools: Sequence[Pool], scores: Values, score: Score) -> Probe | None:
    """The share of the gain over random choice that is left when the instruction is blanked."""
    pairs = [[(BLANK, response) for response in pool.responses] for pool in pools]
    flat = iter(score([pair for own in pairs for pair in own]))
    blind = [np.array([next(flat) for _ in own]) for own in pairs]
    random, seen, unseen = (
        float(np.mean(values))
        for values in (
            [pool.labels.mean() for pool in pools],
            picked(pools, scores),
            picked(pools, blind),
        )
    )
    if seen - random < 1e-3:
        return None
    kept = (unseen - random) / (seen - random)
    share = f"{100 * kept:.0f}%" if kept > 0 else "none"
    return Probe(
        name="response only",
        value=kept,
        meaning=f"With the instruction blanked the scorer's pick has {percent(unseen)} instead of {percent(seen)} "
        f"(random choice {percent(random)}): {share} of its gain is read off the response alone.",
    )


def _length(pools: Sequence[Pool], scores: Values) -> Probe | None:
    """How much more scores go with length, inside a pool, than labels do."""
    lengths = [np.array([len(response) for response in pool.responses], dtype=np.float64) for pool in pools]
    scored, labelled = correlation(scores, lengths), correlation([pool.labels for pool in pools], lengths)
    if scored is None or labelled is None:
        return None
    kind = "prefers longer responses than" if scored > labelled else "prefers shorter responses than"
    word = kind if abs(scored - labelled) > 0.1 else "favours length no more and no less than"
    return Probe(
        name="length",
        value=scored - labelled,
        meaning=f"Inside a pool scores correlate with length by {scored:+.2f}, labels by {labelled:+.2f}: the scorer "
        f"{word} the labels do.",
    )


def _templates(tasks: Sequence[TaskRow]) -> Iterator[Probe]:
    """The spread of a task's accuracy over its templates, averaged over tasks."""
    spreads = [float(np.std(list(row.templates.values()))) for row in tasks if len(row.templates) > 1]
    if spreads:
        mean = float(np.mean(spreads))
        yield Probe(
            name="template",
            value=mean,
            meaning=f"Over the templates of one task the accuracy varies by {percent(mean)} (standard deviation, mean "
            f"of {len(spreads)} tasks): a wording of your own may be that far off.",
        )


def _order(pools: Sequence[Pool], scores: Values, score: Score) -> Probe:
    """The largest change of a score when pairs come in another order and batch."""
    pairs = {
        (pool.instance.instruction, response): value
        for pool, values in zip(pools, scores, strict=True)
        for response, value in zip(pool.responses, values, strict=True)
    }
    some = dict(list(pairs.items())[:: max(1, len(pairs) // NUM_REPEATED)][:NUM_REPEATED])
    again = [
        *zip(reversed(some), score(list(reversed(some))), strict=True),
        *((pair, score([pair])[0]) for pair in some),
    ]
    worst = float(max(abs(value - pairs[pair]) for pair, value in again))
    return Probe(
        name="order and batch",
        value=worst,
        meaning=f"Scored again in another order, and each alone, {len(some)} pairs change by {worst:.1g} at most.",
    )


def correlation(one: Sequence[Vector], other: Sequence[Vector]) -> float | None:
    """Pearson's correlation of what values deviate from their pool's mean by; None where one never deviates."""
    first, second = (np.concatenate([values - values.mean() for values in pools]) for pools in (one, other))
    scale = float(np.sqrt((first @ first) * (second @ second)))
    return float(first @ second) / scale if scale > 1e-12 else None
