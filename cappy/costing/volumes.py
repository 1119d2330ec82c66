"""How much a run over a mixture has to do: prompts, candidates, pairs and their tokens, before anything is loaded."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from cappy.costing import Texts, Throughput
from cappy.errors import ConfigError, quote
from cappy.preparation.mixtures import Mixture, load_mixture
from cappy.preparation.mixtures.plan import REFERENCE_AND_MISMATCH, PlanRow, plan_mixture

EVALUATED_ON: Mapping[str, str] = {"t0": "heldout"}
"""Mixture that a scorer is pretrained on -> the one that it is evaluated on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Means of tokens and of their squares, which attention's cost goes by."""

    tokens: float
    squared: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Volumes:
    """What the steps of a pretraining have to do.

    `pairs` are the rows of the regression set, `selectable` those that a selector may pick (neither references nor
    mismatches), `samples` the candidates of every open-ended prompt by generator. `known` is the share of prompts whose
    lengths were measured; means of the others stand for the rest.
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
        """Responses that the generators draw."""
        return self.open_prompts * sum(self.samples.values())


def mixture_volumes(name: str, samples: Mapping[str, int], throughput: Throughput) -> Volumes:
    """The volumes of pretraining on a mixture; ConfigError for one that nothing is pretrained on.

    `samples` maps each generator to its candidates for every open-ended prompt, all as long as the references are.
    """
    if name not in EVALUATED_ON:
        raise ConfigError(f"plan: --mixture: nothing is pretrained on {quote(name)}; choose {', '.join(EVALUATED_ON)}")
    mixture = replace(load_mixture(name), samples=sum(samples.values()))
    held_out = load_mixture(EVALUATED_ON[name])
    trained, evaluated = _rows(mixture), [row for row in _rows(held_out) if row.pairs]
    texts, other = _lengths(throughput, name), _lengths(throughput, held_out.name)
    opened = [row for row in trained if row.kind == "open-ended"]
    prompts, open_prompts, pairs = (_sum(trained, _examples), _sum(opened, _examples), _sum(trained, _pairs))
    known = [row for row in trained if (row.subset, row.kind) in texts]
    return Volumes(
        prompts=prompts,
        open_prompts=open_prompts,
        pairs=pairs,
        selectable=pairs - REFERENCE_AND_MISMATCH * open_prompts,
        samples=dict(samples),
        prompt=Lengths(
            tokens=_mean(opened, texts, _examples, lambda one: one.prompt_tokens),
            squared=_mean(opened, texts, _examples, lambda one: one.prompt_squared),
        ),
        response_tokens=_mean(opened, texts, _examples, lambda one: one.response_tokens),
        pair=_pair_lengths(trained, texts),
        evaluated_pairs=_sum(evaluated, _pairs),
        evaluated_pair=_pair_lengths(evaluated, other),
        known=_sum(known, _examples) / prompts,
    )


Known = Mapping[tuple[str, str], Texts]
Count = Callable[[PlanRow], int]


def _rows(mixture: Mixture) -> tuple[PlanRow, ...]:
    return plan_mixture(mixture).rows


def _lengths(throughput: Throughput, name: str) -> Known:
    return {(one.subset, one.kind): one for one in throughput.texts_of(name)}


def _examples(row: PlanRow) -> int:
    return row.examples or 0


def _pairs(row: PlanRow) -> int:
    return row.pairs or 0


def _sum(rows: Iterable[PlanRow], count: Count) -> int:
    return sum(map(count, rows))


def _pair_lengths(rows: Sequence[PlanRow], texts: Known) -> Lengths:
    return Lengths(
        tokens=_mean(rows, texts, _pairs, lambda one: one.pair_tokens),
        squared=_mean(rows, texts, _pairs, lambda one: one.pair_squared),
    )


def _mean(rows: Sequence[PlanRow], texts: Known, weight: Count, value: Callable[[Texts], float]) -> float:
    """Mean over the rows, each weighing as often as it is counted; rows of unknown length are as their kind's mean."""
    total = weighed = 0.0
    for kind in {row.kind for row in rows}:
        own = [row for row in rows if row.kind == kind]
        known = [(weight(row), value(texts[row.subset, kind])) for row in own if (row.subset, kind) in texts]
        count = sum(number for number, _ in known)
        if not count:
            raise ConfigError(
                f"plan: the measured speeds have no lengths of {kind} prompts; write it with benchmarks/throughput.py"
            )
        mean = sum(number * length for number, length in known) / count
        total += _sum(own, weight) * mean
        weighed += _sum(own, weight)
    return total / weighed
