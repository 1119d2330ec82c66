"""Metrics by name: each gives a response its correctness, 0 to 1, the best over the references.

`rougeL` is the published label. The others see what it cannot: signs and decimals, order of characters, other scripts;
`given` is the label that came with the response. A mixture is written `0.5*rougeL+0.5*exact_match`; its weights sum
to 1.
"""

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cappy.annotation.numbers import last_number, read_numbers
from cappy.errors import ConfigError, RecordError, quote
from cappy.records import Candidate, Instance
from cappy.records.instance import GIVEN

if TYPE_CHECKING:
    from sacrebleu.metrics import BLEU, CHRF

Floats = npt.NDArray[np.float64]

_TERM = re.compile(r"(?:([0-9]*\.?[0-9]+)\*)?(\w+)")
_SUM_TOLERANCE = 1e-6
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LIBRARIES: Mapping[str, str] = {"rougeL": "nltk", "chrf": "sacrebleu", "bleu": "sacrebleu"}
"""Name -> the library whose release decides its values (of Rouge-L, the stemmer's)."""


@dataclass(frozen=True, slots=True)
class InstanceResponses:
    """The responses of one instance that a metric is asked about."""

    instance: Instance
    candidates: Sequence[Candidate]


Metric = Callable[[Sequence[InstanceResponses]], Floats]
"""From pools to the correctness, 0 to 1, of all their candidates in a row."""


def parse_metric(text: str) -> dict[str, float]:
    """Metric -> weight; ConfigError for an unknown name, a repeated one, and weights that do not sum to 1."""
    weights: dict[str, float] = {}
    for term in text.split("+"):
        match = _TERM.fullmatch(term.strip())
        if match is None or match[2] not in METRICS:
            known = f"choose one of {', '.join(METRICS)}, or a mixture such as 0.5*rougeL+0.5*exact_match"
            raise ConfigError(f"annotation: --metric: unknown metric {quote(term.strip())}; {known}")
        if match[2] in weights:
            raise ConfigError(f"annotation: --metric: {match[2]} is in {quote(text)} twice; give it one weight")
        weights[match[2]] = float(match[1] or 1)
    total = math.fsum(weights.values())
    if abs(total - 1) > _SUM_TOLERANCE:
        raise ConfigError(
            f"--metric: the weights of {quote(text)} sum to {total:g}; labels are 0 to 1, so they must sum to 1"
        )
    return weights


def load_metric(text: str) -> Metric:
    """The function of a metric or mixture; of `given`, RecordError where a candidate came without a label."""
    terms = [(METRICS[name], weight) for name, weight in parse_metric(text).items()]
    if len(terms) == 1:
        return terms[0][0]

    def mixture(pools: Sequence[InstanceResponses]) -> Floats:
        parts = [weight * metric(pools) for metric, weight in terms]
        mixed: Floats = np.clip(np.sum(parts, axis=0), 0.0, 1.0)
        return mixed

    return mixture


def library_versions(text: str) -> dict[str, str]:
    """Release of every library that decides the values of a metric or mixture."""
    return {_LIBRARIES[name]: version(_LIBRARIES[name]) for name in parse_metric(text) if name in _LIBRARIES}


def _given_labels(pools: Sequence[InstanceResponses]) -> Floats:
    """The labels that the candidates brought."""
    return np.array(
        [_given_label(pool.instance, candidate) for pool in pools for candidate in pool.candidates], dtype=float
    )


def _given_label(instance: Instance, candidate: Candidate) -> float:
    if GIVEN not in candidate.labels:
        what = f"response {quote(candidate.response)} came without a label"
        remedy = "give every response a label from 0 to 1, or choose another --metric"
        raise RecordError(f"instance {quote(instance.instance_id)}: {what}; {remedy}")
    return candidate.labels[GIVEN]


def exact_match(references: Sequence[str], response: str) -> float:
    """1 if the response is one of the references, Unicode's composed forms and runs of white space apart; else 0.

    Case and punctuation count.
    """
    wanted = _normalize_unicode(response)
    return float(any(_normalize_unicode(reference) == wanted for reference in references))


def numeric_match(references: Sequence[str], response: str) -> float:
    """1 if the last number of the response equals the last number of a reference, else 0; see `last_number`.

    The last, because worked solutions end with their answer (GSM8K's do; Cobbe et al. 2021); in LaTeX the last box's
    (MATH's; Hendrycks et al. 2021). Signs and decimals count, spelling does not: 5 and -5 differ; 1,000.0, 1 000 and
    1000 do not. Where a comma of the response may be a decimal comma or a list's, either reading will do.
    """
    numbers = read_numbers(response)
    return float(numbers[0] is not None and any(last_number(reference) in numbers for reference in references))


def token_f1(references: Sequence[str], response: str) -> float:
    """F1 of the words in common, in whatever order; the best over the references (SQuAD; Rajpurkar et al. 2016, §6.1).

    Equal to the evaluation script of SQuAD 2.0 to the last bit: words are lower-cased; ASCII punctuation and the
    articles a, an, the are dropped, so that $500 is 500 and C++ is C. Two texts without words are equal.
    """
    words = Counter(_words(response))
    return max((_f1(Counter(_words(reference)), words) for reference in references), default=0.0)


def _f1(target: Counter[str], words: Counter[str]) -> float:
    if not target or not words:
        return float(not target and not words)
    common = (target & words).total()
    if not common:
        return 0.0
    precision, recall = common / words.total(), common / target.total()
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _normalize_unicode(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def chrf(references: Sequence[str], response: str) -> float:
    """chrF2 of a response, 0 to 1, the best over the references: character n-grams up to 6 (Popović 2015)."""
    return max((_chrf().sentence_score(response, [reference]).score / 100 for reference in references), default=0.0)


def bleu(references: Sequence[str], response: str) -> float:
    """Sentence BLEU, 0 to 1, over all references at once (Papineni et al. 2002).

    Tokens are 13a, n-grams up to 4 or to the response's length, zero counts smoothed by halving: a sentence is short,
    and one missing 4-gram would make it 0.
    """
    return min(1.0, _bleu().sentence_score(response, list(references)).score / 100) if references else 0.0


@cache
def _chrf() -> "CHRF":
    from sacrebleu.metrics import CHRF

    return CHRF()


@cache
def _bleu() -> "BLEU":
    from sacrebleu.metrics import BLEU

    return BLEU(effective_order=True)


def _rouge_l(pools: Sequence[InstanceResponses]) -> Floats:
    from cappy.annotation.rouge import rouge_l_pools

    responses = [[candidate.response for candidate in pool.candidates] for pool in pools]
    return rouge_l_pools([pool.instance.references for pool in pools], responses)


def _rouge_l_unicode(references: Sequence[str], response: str) -> float:
    from cappy.annotation.rouge import rouge_l_unicode

    return rouge_l_unicode(references, response)


def _apply_per_response(function: Callable[[Sequence[str], str], float]) -> Metric:
    def of_pool(pool: InstanceResponses) -> list[float]:
        known = {text: function(pool.instance.references, text) for text in {c.response for c in pool.candidates}}
        return [known[candidate.response] for candidate in pool.candidates]

    def metric(pools: Sequence[InstanceResponses]) -> Floats:
        return np.fromiter(chain.from_iterable(map(of_pool, pools)), dtype=np.float64)

    return metric


METRICS: Mapping[str, Metric] = {
    "rougeL": _rouge_l,
    "rougeL_unicode": _apply_per_response(_rouge_l_unicode),
    "exact_match": _apply_per_response(exact_match),
    "numeric_match": _apply_per_response(numeric_match),
    "token_f1": _apply_per_response(token_f1),
    "chrf": _apply_per_response(chrf),
    "bleu": _apply_per_response(bleu),
    GIVEN: _given_labels,
}
"""The function of each; what it needs beside numpy is imported when it is used."""
