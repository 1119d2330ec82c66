"""Metrics by name: each gives a response its correctness, 0 to 1, the best over the references.

`rougeL` is the published label. The others see what it cannot: signs and decimals, order of characters, other scripts;
`given` is the label that came with the response. A mixture is written `0.5*rougeL+0.5*exact_match`; its weights sum
to 1.
"""

import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain

import numpy as np
import numpy.typing as npt

from cappy.errors import ConfigError, RecordError, shown
from cappy.records import Candidate, Instance
from cappy.records.instance import GIVEN

Floats = npt.NDArray[np.float64]

METRICS: Mapping[str, str] = {
    "rougeL": "cappy.annotation.rouge:rouge_l_pools",
    "rougeL_unicode": "cappy.annotation.rouge:rouge_l_unicode",
    "exact_match": "cappy.annotation.matches:exact_match",
    "numeric_match": "cappy.annotation.matches:numeric_match",
    "token_f1": "cappy.annotation.matches:token_f1",
    "chrf": "cappy.annotation.ngrams:chrf",
    "bleu": "cappy.annotation.ngrams:bleu",
    GIVEN: "",
}
"""Name -> module:function, imported when the metric is used; `given` computes nothing."""
POOLED = frozenset({"rougeL"})
"""Metrics whose function takes the references and responses of many instances at once; the others take one response."""
LIBRARIES: Mapping[str, str] = {"rougeL": "nltk", "chrf": "sacrebleu", "bleu": "sacrebleu"}
"""Name -> the library whose release decides its values (of Rouge-L, the stemmer's)."""

_TERM = re.compile(r"(?:([0-9]*\.?[0-9]+)\*)?(\w+)")
_SUM_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Pool:
    """The responses of one instance that a metric is asked about."""

    instance: Instance
    candidates: Sequence[Candidate]


Metric = Callable[[Sequence[Pool]], Floats]
"""From pools to the correctness, 0 to 1, of all their candidates in a row."""


def parse(text: str) -> dict[str, float]:
    """Metric -> weight; ConfigError for an unknown name, a repeated one, and weights that do not sum to 1."""
    weights: dict[str, float] = {}
    for term in text.split("+"):
        found = _TERM.fullmatch(term.strip())
        if found is None or found[2] not in METRICS:
            known = f"choose of {', '.join(METRICS)}, or mix them: 0.5*rougeL+0.5*exact_match"
            raise ConfigError(f"annotation: --metric: {shown(term.strip())} is no metric; {known}")
        if found[2] in weights:
            raise ConfigError(f"annotation: --metric: {found[2]} stands in {shown(text)} twice; give it one weight")
        weights[found[2]] = float(found[1] or 1)
    total = math.fsum(weights.values())
    if abs(total - 1) > _SUM_TOLERANCE:
        raise ConfigError(
            f"--metric: the weights of {shown(text)} sum to {total:g}; labels are 0 to 1, so give 1 in all"
        )
    return weights


def load(text: str) -> Metric:
    """The function of a metric or mixture; of `given`, RecordError where a candidate came without a label."""
    terms = [(_metric(name), weight) for name, weight in parse(text).items()]
    if len(terms) == 1:
        return terms[0][0]

    def mixture(pools: Sequence[Pool]) -> Floats:
        parts = [weight * metric(pools) for metric, weight in terms]
        mixed: Floats = np.clip(np.sum(parts, axis=0), 0.0, 1.0)
        return mixed

    return mixture


def versions(text: str) -> dict[str, str]:
    """Release of every library that decides the values of a metric or mixture."""
    return {LIBRARIES[name]: version(LIBRARIES[name]) for name in parse(text) if name in LIBRARIES}


def given(pools: Sequence[Pool]) -> Floats:
    """The labels that the candidates brought."""
    return np.array(
        [_brought(pool.instance, candidate) for pool in pools for candidate in pool.candidates], dtype=float
    )


def _brought(instance: Instance, candidate: Candidate) -> float:
    if GIVEN not in candidate.labels:
        what = f"response {shown(candidate.response)} came without a label"
        remedy = "give every response a label from 0 to 1, or choose another --metric"
        raise RecordError(f"instance {shown(instance.instance_id)}: {what}; {remedy}")
    return candidate.labels[GIVEN]


def _metric(name: str) -> Metric:
    if name == GIVEN:
        return given
    module, _, attribute = METRICS[name].partition(":")
    function = getattr(importlib.import_module(module), attribute)
    return _of_pools(function) if name in POOLED else _one_by_one(function)


def _of_pools(function: Callable[[Sequence[Sequence[str]], Sequence[Sequence[str]]], Floats]) -> Metric:
    def metric(pools: Sequence[Pool]) -> Floats:
        responses = [[candidate.response for candidate in pool.candidates] for pool in pools]
        return function([pool.instance.references for pool in pools], responses)

    return metric


def _one_by_one(function: Callable[[Sequence[str], str], float]) -> Metric:
    def of_pool(pool: Pool) -> list[float]:
        known = {text: function(pool.instance.references, text) for text in {c.response for c in pool.candidates}}
        return [known[candidate.response] for candidate in pool.candidates]

    def metric(pools: Sequence[Pool]) -> Floats:
        return np.fromiter(chain.from_iterable(map(of_pool, pools)), dtype=np.float64)

    return metric
