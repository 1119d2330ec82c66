"""The amount of work for a mixture (prompts, candidates, pairs, tokens), without loading any data."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from cappy.costing import TextLengths, Throughput
from cappy.errors import ConfigError, quote
from cappy.preparation.mixtures import Mixture, load_mixture
from cappy.preparation.mixtures.plan import REFERENCE_AND_MISMATCH, PlanRow, plan_mixture

EVALUATED_ON: Mapping[str, str] = {"t0": "heldout"}
"""Pretraining mixture -> evaluation mixture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Means of the number of tokens and of its square, for the cost of attention."""

    tokens: float
    squared: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Volumes:
    """The amount of work of a pretraining.

    `pairs` are the rows of the regression set, `selectable` those that a selector may pick (neither references nor
    mismatches), `samples` the candidates per open-ended prompt by generator. `known` is the share of prompts whose
    lengths were measured; the others are assumed to have the same means.
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
    known: float

    @property
    def candidates(self) -> int:
        """Number of sampled responses."""
        return self.open_prompts * sum(self.samples.values())


def mixture_volumes(name: str, samples: Mapping[str, int], throughput: Throughput) -> Volumes:
    """The volumes of pretraining on a mixture; ConfigError if it is not a pretraining mixture.

    `samples` maps each generator to its candidates per open-ended prompt, which are assumed to be
    as long as the references.
    """
    if name not in EVALUATED_ON:
        raise ConfigError(
            f"plan: --mixture: {quote(name)} is not a pretraining mixture; choose {', '.join(EVALUATED_ON)}"
        )
    mixture = replace(load_mixture(name), samples=sum(samples.values()))
    held_out = load_mixture(EVALUATED_ON[name])
    trained, evaluated = _rows(mixture), [row for row in _rows(held_out) if row.pairs]
    texts, evaluated_texts = _texts_by_subset(throughput, name), _texts_by_subset(throughput, held_out.name)
    open_ended = [row for row in trained if row.kind == "open-ended"]
    prompts, open_prompts, pairs = (
        _sum(trained, _num_examples),
        _sum(open_ended, _num_examples),
        _sum(trained, _num_pairs),
    )
    known = [row for row in trained if (row.subset, row.kind) in texts]
    return Volumes(
        prompts=prompts,
        open_prompts=open_prompts,
        pairs=pairs,
        selectable=pairs - REFERENCE_AND_MISMATCH * open_prompts,
        samples=dict(samples),
        prompt=Lengths(
            tokens=_mean(open_ended, texts, _num_examples, lambda lengths: lengths.prompt_tokens),
            squared=_mean(open_ended, texts, _num_examples, lambda lengths: lengths.prompt_squared),
        ),
        response_tokens=_mean(open_ended, texts, _num_examples, lambda lengths: lengths.response_tokens),
        pair=_pair_lengths(trained, texts),
        evaluated_pairs=_sum(evaluated, _num_pairs),
        evaluated_pair=_pair_lengths(evaluated, evaluated_texts),
        known=_sum(known, _num_examples) / prompts,
    )


TextsBySubset = Mapping[tuple[str, str], TextLengths]
Count = Callable[[PlanRow], int]


def _rows(mixture: Mixture) -> tuple[PlanRow, ...]:
    return plan_mixture(mixture).rows


def _texts_by_subset(throughput: Throughput, name: str) -> TextsBySubset:
    return {(texts.subset, texts.kind): texts for texts in throughput.lengths_of(name)}


def _num_examples(row: PlanRow) -> int:
    return row.examples or 0


def _num_pairs(row: PlanRow) -> int:
    return row.pairs or 0


def _sum(rows: Iterable[PlanRow], count: Count) -> int:
    return sum(map(count, rows))


def _pair_lengths(rows: Sequence[PlanRow], texts: TextsBySubset) -> Lengths:
    return Lengths(
        tokens=_mean(rows, texts, _num_pairs, lambda lengths: lengths.pair_tokens),
        squared=_mean(rows, texts, _num_pairs, lambda lengths: lengths.pair_squared),
    )


def _mean(rows: Sequence[PlanRow], texts: TextsBySubset, weight: Count, value: Callable[[TextLengths], float]) -> float:
    """Mean over the rows, weighted by `weight`; rows of unknown length get the mean of their kind."""
    total = total_weight = 0.0
    for kind in {row.kind for row in rows}:
        kind_rows = [row for row in rows if row.kind == kind]
        known = [(weight(row), value(texts[row.subset, kind])) for row in kind_rows if (row.subset, kind) in texts]
        count = sum(number for number, _ in known)
        if not count:
            raise ConfigError(
                f"plan: the measured speeds have no lengths of {kind} prompts; run benchmarks/throughput.py"
            )
        mean = sum(number * length for number, length in known) / count
        total += _sum(kind_rows, weight) * mean
        total_weight += _sum(kind_rows, weight)
    return total / total_weight
