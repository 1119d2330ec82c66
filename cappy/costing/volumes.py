"""The amount of work for a mixture (prompts, candidates, pairs, tokens), without loading any data."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from cappy.costing import TextLengths, Throughput
from cappy.errors import ConfigError, quote
from cappy.preparation.mixtures import Mixture, load_mixture
from cappy.preparation.mixtures.plan import NUM_EXTRA_TRAINING_PAIRS, PlanRow, plan_mixture

EVALUATED_ON: Mapping[str, str] = {"t0": "heldout"}
"""Pretraining mixture -> evaluation mixture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """The mean number of tokens, and the mean of its square, which determines the cost of attention."""

    tokens: float
    squared: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Volumes:
    """The amount of work of pretraining on a mixture and evaluating the scorer.

    `pairs` is the number of rows of the regression set, `selectable` the number of those that a selector may pick
    (neither references nor mismatches), `samples` the candidates per open-ended prompt by generator.
    `measured_share` is the share of prompts, 0 to 1, whose lengths were measured; the others are assumed to have the
    same means.
    """

    prompts: int
    open_prompts: int
    pairs: int
    selectable: int
    samples: Mapping[str, int]
    prompt: Lengths
    response_tokens: float
    pair: Lengths
    evaluated_pairs: int
    evaluated_pair: Lengths
    measured_share: float

    @property
    def candidates(self) -> int:
        """Number of sampled responses."""
        return self.open_prompts * sum(self.samples.values())


def mixture_volumes(name: str, samples: Mapping[str, int], throughput: Throughput) -> Volumes:
    """The volumes of pretraining on a mixture; raises ConfigError if it is not a pretraining mixture.

    `samples` maps each generator to its candidates per open-ended prompt, which are assumed to be as long as the
    references.
    """
    if name not in EVALUATED_ON:
        raise ConfigError(
            f"plan: --mixture: {quote(name)} is not a pretraining mixture; choose {', '.join(EVALUATED_ON)}"
        )
    mixture = replace(load_mixture(name), samples=sum(samples.values()))
    held_out = load_mixture(EVALUATED_ON[name])
    training_rows, evaluation_rows = _rows(mixture), [row for row in _rows(held_out) if row.pairs]
    lengths, evaluation_lengths = _lengths_by_subset(throughput, name), _lengths_by_subset(throughput, held_out.name)
    open_ended = [row for row in training_rows if row.kind == "open-ended"]
    prompts, open_prompts, pairs = (
        _sum(training_rows, _num_examples),
        _sum(open_ended, _num_examples),
        _sum(training_rows, _num_pairs),
    )
    measured = [row for row in training_rows if (row.subset, row.kind) in lengths]
    return Volumes(
        prompts=prompts,
        open_prompts=open_prompts,
        pairs=pairs,
        selectable=pairs - NUM_EXTRA_TRAINING_PAIRS * open_prompts,
        samples=dict(samples),
        prompt=Lengths(
            tokens=_mean(open_ended, lengths, _num_examples, lambda means: means.prompt_tokens),
            squared=_mean(open_ended, lengths, _num_examples, lambda means: means.prompt_squared),
        ),
        response_tokens=_mean(open_ended, lengths, _num_examples, lambda means: means.response_tokens),
        pair=_pair_lengths(training_rows, lengths),
        evaluated_pairs=_sum(evaluation_rows, _num_pairs),
        evaluated_pair=_pair_lengths(evaluation_rows, evaluation_lengths),
        measured_share=_sum(measured, _num_examples) / prompts,
    )


LengthsBySubset = Mapping[tuple[str, str], TextLengths]
Count = Callable[[PlanRow], int]


def _rows(mixture: Mixture) -> tuple[PlanRow, ...]:
    return plan_mixture(mixture).rows


def _lengths_by_subset(throughput: Throughput, name: str) -> LengthsBySubset:
    return {(means.subset, means.kind): means for means in throughput.lengths_of(name)}


def _num_examples(row: PlanRow) -> int:
    return row.examples or 0


def _num_pairs(row: PlanRow) -> int:
    return row.pairs or 0


def _sum(rows: Iterable[PlanRow], count: Count) -> int:
    return sum(map(count, rows))


def _pair_lengths(rows: Sequence[PlanRow], lengths: LengthsBySubset) -> Lengths:
    return Lengths(
        tokens=_mean(rows, lengths, _num_pairs, lambda means: means.pair_tokens),
        squared=_mean(rows, lengths, _num_pairs, lambda means: means.pair_squared),
    )


def _mean(
    rows: Sequence[PlanRow], lengths: LengthsBySubset, weight: Count, value: Callable[[TextLengths], float]
) -> float:
    """The mean over the rows, weighted by `weight`; rows without measured lengths get the mean of their kind."""
    weighted_sum = total_weight = 0.0
    for kind in {row.kind for row in rows}:
        kind_rows = [row for row in rows if row.kind == kind]
        measured = [
            (weight(row), value(lengths[row.subset, kind])) for row in kind_rows if (row.subset, kind) in lengths
        ]
        measured_weight = sum(row_weight for row_weight, _ in measured)
        if not measured_weight:
            raise ConfigError(
                f"plan: the measured speeds have no lengths of {kind} prompts; run benchmarks/throughput.py"
            )
        mean = sum(row_weight * length for row_weight, length in measured) / measured_weight
        weighted_sum += _sum(kind_rows, weight) * mean
        total_weight += _sum(kind_rows, weight)
    return weighted_sum / total_weight
