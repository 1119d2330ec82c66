"""Metrics by name: each gives a response its correctness, 0 to 1, the best over the references.

`rougeL` is the published label. The others see what it cannot: signs and decimals, order of characters, other scripts.
A mixture is written `0.5*rougeL+0.5*exact_match`; its weights sum to 1.
"""

import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version

from cappy.errors import ConfigError, shown

Metric = Callable[[Sequence[str], str], float]

METRICS: Mapping[str, str] = {
    "rougeL": "cappy.annotation.rouge:rouge_l",
    "rougeL_unicode": "cappy.annotation.unicode_rouge:rouge_l",
    "exact_match": "cappy.annotation.matches:exact_match",
    "numeric_match": "cappy.annotation.matches:numeric_match",
    "token_f1": "cappy.annotation.matches:token_f1",
    "chrf": "cappy.annotation.ngrams:chrf",
    "bleu": "cappy.annotation.ngrams:bleu",
}
"""Name -> module:function, imported when the metric is used."""
LIBRARIES: Mapping[str, str] = {"rougeL": "nltk", "chrf": "sacrebleu", "bleu": "sacrebleu"}
"""Name -> the library whose release decides its values (of Rouge-L, the stemmer's)."""

_TERM = re.compile(r"(?:([0-9]*\.?[0-9]+)\*)?(\w+)")
_SUM_TOLERANCE = 1e-6


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
    """The function of a metric or mixture: (references, response) to 0 to 1."""
    terms = [(_function(name), weight) for name, weight in parse(text).items()]
    if len(terms) == 1:
        return terms[0][0]

    def mixture(references: Sequence[str], response: str) -> float:
        return min(1.0, math.fsum(weight * metric(references, response) for metric, weight in terms))

    return mixture


def versions(text: str) -> dict[str, str]:
    """Release of every library that decides the values of a metric or mixture."""
    return {LIBRARIES[name]: version(LIBRARIES[name]) for name in parse(text) if name in LIBRARIES}


def _function(name: str) -> Metric:
    module, _, function = METRICS[name].partition(":")
    found: Metric = getattr(importlib.import_module(module), function)
    return found
