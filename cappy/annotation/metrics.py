"""Metrics by name: each computes the correctness of a response, 0 to 1.

With several references, it is the maximum over them; only `bleu` compares with all references at once.
`rougeL` is the label of the Cappy paper. The others measure what it ignores: signs and decimals, the order of
characters, other scripts. `given` is the label that the response already has in the data; it needs no reference. A
mixture is written `0.5*rougeL+0.5*exact_match`; its weights sum to 1.
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

from cappy.annotation.numbers import last_number, last_number_readings
from cappy.errors import ConfigError, RecordError, quote
from cappy.records import Candidate, Instance
from cappy.records.instance import GIVEN_METRIC

if TYPE_CHECKING:
    from sacrebleu.metrics import BLEU, CHRF

Floats = npt.NDArray[np.float64]

_TERM = re.compile(r"(?:([0-9]*\.?[0-9]+)\*)?(\w+)")
_SUM_TOLERANCE = 1e-6
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LIBRARIES: Mapping[str, str] = {"rougeL": "nltk", "chrf": "sacrebleu", "bleu": "sacrebleu"}
"""Metric -> the library whose version determines its values (for Rouge-L, that of the stemmer)."""


@dataclass(frozen=True, slots=True)
class CandidatePool:
    """An instance and the candidates to compute a metric for."""

    instance: Instance
    candidates: Sequence[Candidate]


Metric = Callable[[Sequence[CandidatePool]], Floats]
"""Computes the correctness, 0 to 1, of the candidates of all pools, concatenated: shape (candidates,)."""


def parse_metric(text: str) -> dict[str, float]:
    """Metric -> weight. Raises ConfigError for unknown or repeated names, and for weights that do not sum to 1."""
    weights: dict[str, float] = {}
    for term in text.split("+"):
        match = _TERM.fullmatch(term.strip())
        if match is None or match[2] not in METRICS:
            remedy = f"choose one of {', '.join(METRICS)}, or a mixture such as 0.5*rougeL+0.5*exact_match"
            raise ConfigError(f"annotation: --metric: unknown metric {quote(term.strip())}; {remedy}")
        if match[2] in weights:
            raise ConfigError(f"annotation: --metric: {match[2]} is in {quote(text)} twice; give it one weight")
        weights[match[2]] = float(match[1] or 1)
    total = math.fsum(weights.values())
    if abs(total - 1) > _SUM_TOLERANCE:
        raise ConfigError(f"annotation: --metric: the weights of {quote(text)} sum to {total:g}; they must sum to 1")
    return weights


def load_metric(text: str) -> Metric:
    """The function of a metric or mixture; that of `given` raises RecordError for a candidate without such a label."""
    terms = [(METRICS[name], weight) for name, weight in parse_metric(text).items()]
    if len(terms) == 1:
        return terms[0][0]

    def mixture(pools: Sequence[CandidatePool]) -> Floats:
        parts = [weight * metric(pools) for metric, weight in terms]
        mixed: Floats = np.clip(np.sum(parts, axis=0), 0.0, 1.0)
        return mixed

    return mixture


def library_versions(text: str) -> dict[str, str]:
    """Name -> version of the libraries that determine the values of a metric or mixture."""
    return {_LIBRARIES[name]: version(_LIBRARIES[name]) for name in parse_metric(text) if name in _LIBRARIES}


def _given_labels(pools: Sequence[CandidatePool]) -> Floats:
    """The labels that the candidates already have in the data."""
    return np.array(
        [_given_label(pool.instance, candidate) for pool in pools for candidate in pool.candidates], dtype=float
    )


def _given_label(instance: Instance, candidate: Candidate) -> float:
    if GIVEN_METRIC not in candidate.labels:
        problem = f"response {quote(candidate.response)} has no given label"
        remedy = "give every response a label from 0 to 1, or choose another --metric"
        raise RecordError(f"instance {quote(instance.instance_id)}: {problem}; {remedy}")
    return candidate.labels[GIVEN_METRIC]


def exact_match(references: Sequence[str], response: str) -> float:
    """1 if the response equals a reference after normalising Unicode (NFC) and white space, else 0.

    Case and punctuation matter.
    """
    normalized = _normalize_unicode(response)
    return float(any(_normalize_unicode(reference) == normalized for reference in references))


def numeric_match(references: Sequence[str], response: str) -> float:
    """1 if the last number of the response equals the last number of a reference, else 0; see `last_number`.

    Worked solutions end with their answer (GSM8K; Cobbe et al. 2021); in LaTeX it is in the last \\boxed (MATH;
    Hendrycks et al. 2021). Signs and decimals matter, formatting does not: 5 and -5 differ; 1,000.0, 1 000 and 1000 do
    not. If a comma of the response may be a decimal comma or a list separator, either reading may match.
    """
    numbers = last_number_readings(response)
    return float(numbers[0] is not None and any(last_number(reference) in numbers for reference in references))


def token_f1(references: Sequence[str], response: str) -> float:
    """F1 of common words in any order, the maximum over the references (SQuAD; Rajpurkar et al. 2016, §6.1).

    Equal to the evaluation script of SQuAD 2.0 to the last bit: words are lower-cased; ASCII punctuation and the
    articles a, an, the are dropped, so $500 becomes 500 and C++ becomes C. Two texts without words are equal.
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
    """chrF2 of a response, 0 to 1, the maximum over the references: character n-grams up to 6 (Popović 2015)."""
    return max((_chrf().sentence_score(response, [reference]).score / 100 for reference in references), default=0.0)


def bleu(references: Sequence[str], response: str) -> float:
    """Sentence BLEU, 0 to 1, over all references at once (Papineni et al. 2002).

    Tokenised by 13a, with n-grams up to 4 or the response's length (effective order). Zero counts are smoothed
    exponentially, because one missing 4-gram would make a short sentence 0.
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


def _rouge_l(pools: Sequence[CandidatePool]) -> Floats:
    from cappy.annotation.rouge import rouge_l_pools

    responses = [[candidate.response for candidate in pool.candidates] for pool in pools]
    return rouge_l_pools([pool.instance.references for pool in pools], responses)


def _rouge_l_unicode(references: Sequence[str], response: str) -> float:
    from cappy.annotation.rouge import rouge_l_unicode

    return rouge_l_unicode(references, response)


def _apply_per_response(function: Callable[[Sequence[str], str], float]) -> Metric:
    def label_pool(pool: CandidatePool) -> list[float]:
        values = {text: function(pool.instance.references, text) for text in {c.response for c in pool.candidates}}
        return [values[candidate.response] for candidate in pool.candidates]

    def metric(pools: Sequence[CandidatePool]) -> Floats:
        return np.fromiter(chain.from_iterable(map(label_pool, pools)), dtype=np.float64)

    return metric


METRICS: Mapping[str, Metric] = {
    "rougeL": _rouge_l,
    "rougeL_unicode": _apply_per_response(_rouge_l_unicode),
    "exact_match": _apply_per_response(exact_match),
    "numeric_match": _apply_per_response(numeric_match),
    "token_f1": _apply_per_response(token_f1),
    "chrf": _apply_per_response(chrf),
    "bleu": _apply_per_response(bleu),
    GIVEN_METRIC: _given_labels,
}
"""Metric -> its function; libraries other than numpy are imported when the function is called."""
