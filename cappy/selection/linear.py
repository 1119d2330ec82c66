"""The fitted selector: picks by a weighted sum of what is known about the candidates of a pool.

Its features are the scorer's score, MBR (the consensus of the pool), the likelihood under the generator, and whether
the response is that of a single decoding, the greedy one where there is one. A caller may lack the likelihoods or the
greedy response, so there is one rule for each set of features. `cappy.selection.fitting` fits them.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from cappy.errors import ConfigError, FolderError
from cappy.records.instance import MAX_LOGPROB
from cappy.selection.pools import Pool, Vector, greedy_systems, is_greedy, mbr, system_index

SELECTOR = "selector.json"
Feature = Literal["score", "mbr", "likelihood", "greedy"]
Evidence = Literal["held-out", "out-of-fold"]
"""Which pools a selector was fitted on: held out from training, or scored by a scorer of another fold."""
FEATURE_SETS: tuple[tuple[Feature, ...], ...] = (
    ("score",),
    ("score", "mbr"),
    ("score", "likelihood"),
    ("score", "mbr", "greedy"),
    ("score", "mbr", "likelihood"),
    ("score", "mbr", "likelihood", "greedy"),
)
"""The sets of features that a caller may have, smallest first; a closed set of choices has neither MBR nor greedy."""
TRUNCATED_PENALTY = 1e6
"""Subtracted from the value of a truncated response, more than weighted features can differ."""
MIN_SPREAD = 1e-13
"""Standard deviation of a feature in a pool below which its values are equal up to rounding."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The responses to one instruction, and what a caller knows about them besides their texts.

    `likelihoods` are log-likelihoods per token under the generator, in order; None if one is unknown. `greedy` is the
    index of the greedy response, or of another decoding that does well alone; None if unknown. `truncated` are the
    indices of responses that a length limit cut off: they are picked only if all are. The responses may be a closed set
    of choices, which has no consensus. Raises ConfigError if these do not fit the responses.
    """

    responses: Sequence[str]
    likelihoods: Sequence[float] | Vector | None = None
    greedy: int | None = None
    closed_choices: bool = False
    truncated: Collection[int] = ()

    def __post_init__(self) -> None:
        count = len(self.responses)
        if not count:
            raise ConfigError("select: there are no responses to choose from; pass at least one")
        if self.likelihoods is not None and len(self.likelihoods) != count:
            raise ConfigError(f"likelihoods: there are {len(self.likelihoods)} for {count} responses; pass one each")
        if self.likelihoods is not None and not all(map(_is_logprob, self.likelihoods)):
            raise ConfigError("likelihoods: must be log-probabilities; leave them out if one is unknown")
        if self.greedy is not None and not 0 <= self.greedy < count:
            raise ConfigError(f"greedy: must be the index of a response, 0 to {count - 1}, got {self.greedy}")
        for index in self.truncated:
            if not 0 <= index < count:
                raise ConfigError(f"truncated: must be indices of responses, 0 to {count - 1}, got {index}")

    def with_scores(self, scores: Sequence[float], logits: Sequence[float] | None = None) -> "PoolFeatures":
        """These candidates with the scorer's scores, and its logits if they are known."""
        return PoolFeatures(
            responses=self.responses,
            likelihoods=self.likelihoods,
            greedy=self.greedy,
            closed_choices=self.closed_choices,
            truncated=self.truncated,
            scores=np.asarray(scores, dtype=np.float64),
            logits=None if logits is None else np.asarray(logits, dtype=np.float64),
        )


@dataclass(frozen=True, kw_only=True)
class PoolFeatures(Candidates):
    """Candidates with the scorer's `scores`, shape (candidates,).

    `logits` decide between equal values: far from 0, different logits have equal scores. `consensus` are the MBR
    values of the responses, if they are computed already.
    """

    scores: Vector
    logits: Vector | None = None
    consensus: Vector | None = None

    @property
    def available(self) -> frozenset[Feature]:
        """The features that are known."""
        known: dict[Feature, bool] = {
            "score": True,
            "mbr": not self.closed_choices,
            "likelihood": self.likelihoods is not None,
            "greedy": self.greedy is not None and not self.closed_choices,
        }
        return frozenset(name for name, is_known in known.items() if is_known)

    def without(self, names: frozenset[Feature]) -> "PoolFeatures":
        """The same without likelihoods or the greedy response, for a caller who lacks them."""
        likelihoods = None if "likelihood" in names else self.likelihoods
        return replace(self, likelihoods=likelihoods, greedy=None if "greedy" in names else self.greedy)

    def matrix(self, names: Sequence[Feature]) -> npt.NDArray[np.float64]:
        """The named features, shape (candidates, features), standardised within the pool except the 0 or 1 of greedy.

        A feature that is equal for all candidates is 0.
        """
        matrix = np.zeros((len(self.responses), len(names)))
        for index, name in enumerate(names):
            column = self.column(name)
            matrix[:, index] = column if name == "greedy" else standardize(column)
        return matrix

    def column(self, name: Feature) -> Vector:
        """The values of a feature that is known, shape (candidates,)."""
        if name == "greedy":
            is_greedy: Vector = (np.arange(len(self.responses)) == self.greedy).astype(np.float64)
            return is_greedy
        if name == "mbr":
            return mbr(self.responses) if self.consensus is None else self.consensus
        return np.asarray(self.scores if name == "score" else self.likelihoods, dtype=np.float64)


def _is_logprob(value: object) -> bool:
    return isinstance(value, int | float | np.floating) and abs(float(value)) <= MAX_LOGPROB


def standardize(values: Vector) -> Vector:
    """The values minus their mean, divided by their standard deviation; 0 if all are equal."""
    deviations = values - values.mean()
    spread = deviations.std()
    standardized: Vector = deviations / spread if spread > MIN_SPREAD else np.zeros_like(deviations)
    return standardized


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Weights of a set of features, each standardised within the pool.

    `scales` are the mean standard deviations of the features within a pool (1 for greedy), and `label_slope` is the
    expected difference in label per unit of the value; there are no scales if nothing was fitted. `gain` is the
    cross-validated gain in label, 0 to 1, over the best single feature, and `standard_error` that of the gain; both are
    0 for a set of one feature. If the gain was below one standard error, only the best single feature has a weight.
    """

    features: tuple[Feature, ...]
    weights: tuple[float, ...]
    scales: tuple[float, ...] = ()
    label_slope: float = 1.0
    gain: float = 0.0
    standard_error: float = 0.0
    groups: int = 0

    @property
    def used(self) -> dict[Feature, float]:
        """The features with a weight other than 0."""
        return {name: weight for name, weight in zip(self.features, self.weights, strict=True) if weight}

    @property
    def single(self) -> Feature | None:
        """The feature that the rule picks by if it uses one feature only; None if it uses several."""
        return next(iter(self.used)) if len(self.used) == 1 else None

    @property
    def names(self) -> str:
        """The features that the rule uses, such as "score + likelihood"."""
        return " + ".join(self.used)

    @property
    def text(self) -> str:
        """The features with their weights, such as "score 2.7, likelihood 1.2"; the name alone of a single feature."""
        return self.single or ", ".join(f"{name} {weight:.2g}" for name, weight in self.used.items())


SCORE_RULE = Rule(features=("score",), weights=(1.0,))


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The selector's value of each candidate, and the indices of the candidates, best first.

    Of equal values the one with the higher logit is first, then the one with the lower index.
    """

    values: Vector
    order: tuple[int, ...]

    @property
    def picked(self) -> int:
        """The index of the picked candidate."""
        return self.order[0]


@dataclass(frozen=True, kw_only=True)
class Selector:
    """Picks one candidate of a pool by the rule for the features that are known.

    `rules` are in the order of `FEATURE_SETS`. `metric` names the label that they were fitted on, `groups` is the
    number of groups, and `evidence` says how these were held out; None if nothing was fitted. `scorer` is the version
    of the scorer that the selector belongs to, `decoding` the single decoding that the feature greedy stands for.
    """

    rules: tuple[Rule, ...] = (SCORE_RULE,)
    metric: str = ""
    groups: int = 0
    evidence: Evidence | None = None
    scorer: str = ""
    decoding: str = ""

    def rule(self, available: frozenset[Feature]) -> Rule:
        """The rule with the most features that are all available; the score alone if there is none."""
        return next((rule for rule in reversed(self.rules) if available.issuperset(rule.features)), SCORE_RULE)

    def label_values(self, pool: PoolFeatures) -> Vector | None:
        """The values in units of the label, shape (candidates,): their differences are expected differences in label.

        Here features are divided by their mean standard deviation over pools, not by that of the pool: candidates that
        hardly differ have almost equal values. None if nothing was fitted.
        """
        rule = self.rule(pool.available)
        if not rule.scales:
            return None
        values = np.zeros(len(pool.responses))
        for name, weight, scale in zip(rule.features, rule.weights, rule.scales, strict=True):
            if weight:  # MBR takes time.
                values += weight / scale * pool.column(name)
        return rule.label_slope * values

    def values(self, pool: PoolFeatures) -> Vector:
        """The value of each candidate, shape (candidates,); the highest is picked.

        Values of different pools are not comparable.
        """
        used = self.rule(pool.available).used
        values: Vector = pool.matrix(list(used)) @ np.array(list(used.values()))
        if 0 < len(pool.truncated) < len(values):
            values[list(pool.truncated)] -= TRUNCATED_PENALTY
        return values

    def decoding_in(self, pools: Sequence[Pool]) -> str:
        """The system of these pools whose responses the feature greedy marks; empty without any.

        A greedy decoding stands for that of any LLM, as in the gateway; another decoding only for itself.
        """
        if self.decoding and not is_greedy(self.decoding):
            return self.decoding
        systems = greedy_systems(pools)
        return self.decoding if self.decoding in systems else min(systems, default="")

    @property
    def uses_likelihoods(self) -> bool:
        """Whether a rule gives the likelihood a weight."""
        return any("likelihood" in rule.used for rule in self.rules)

    def for_caller(self, pool: PoolFeatures) -> PoolFeatures:
        """What the selector may use of a caller's pool: the weight of another decoding says nothing of a greedy one."""
        is_other = bool(self.decoding) and not is_greedy(self.decoding)
        return pool.without(frozenset({"greedy"})) if is_other else pool

    def rank(self, pool: PoolFeatures) -> Ranking:
        """The values of a caller's candidates, and their order."""
        pool = self.for_caller(pool)
        values = self.values(pool)
        keys = (values,) if pool.logits is None else (pool.logits, values)
        # The last key of lexsort is the first one to sort by.
        return Ranking(values=values, order=tuple(np.lexsort([-key for key in keys]).tolist()))

    def to_json(self) -> str:
        """The text of selector.json."""
        return json.dumps(TypeAdapter(Selector).dump_python(self, mode="json"), indent=1) + "\n"


def parse_selector(values: object) -> Selector:
    """The selector with these values of selector.json. Raises ValueError if they are none, or of a later version."""
    try:
        selector: Selector = TypeAdapter(Selector).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from None
    for rule in selector.rules:
        numbers = (*rule.weights, *rule.scales, rule.label_slope)
        if not rule.features or len(set(rule.features)) < len(rule.features):
            raise ValueError("rules: there must be at least one feature, each once")
        if len(rule.weights) != len(rule.features) or len(rule.scales) not in (0, len(rule.features)):
            raise ValueError("rules: there must be a weight and a scale for each feature")
        if not np.isfinite(numbers).all() or any(scale <= 0 for scale in rule.scales):
            raise ValueError("rules: weights must be finite numbers and scales above 0")
    return selector


def read_selector(folder: str | Path, scorer: str = "") -> Selector:
    """Reads the selector in a scorer's or a report's folder; without selector.json, the score alone.

    `scorer` is the version of the scorer that it will be used with. Raises FolderError if the file is damaged or
    belongs to another scorer.
    """
    path = Path(folder) / SELECTOR
    if not path.is_file():
        return Selector()
    try:
        selector = parse_selector(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise FolderError(f"{path}: is not a selector ({error}); evaluate again, or delete it") from error
    if scorer and selector.scorer and selector.scorer != scorer:
        raise FolderError(
            f"{path}: belongs to the scorer {selector.scorer}, not to {scorer}; evaluate {scorer}, or delete the file"
        )
    return selector


def require_selector(folder: str | Path, scorer: str) -> Selector:
    """Like `read_selector`, but raises ConfigError if the folder has no selector.json."""
    if not (Path(folder) / SELECTOR).is_file():
        raise ConfigError(f"{folder}: has no {SELECTOR}; give the folder of a report or of an evaluated scorer")
    return read_selector(folder, scorer)


def features_of(pool: Pool, decoding: str, scores: str = "scorer") -> PoolFeatures:
    """What a caller would know about a pool whose single decoding has this name."""
    return PoolFeatures(
        responses=pool.responses,
        scores=pool.scores[scores],
        likelihoods=pool.likelihood_mean,
        greedy=system_index(pool, decoding),
        closed_choices=pool.is_choice,
        truncated=[index for index, each in enumerate(pool.candidates) if each.status == "truncated"],
        consensus=None if pool.is_choice else pool.mbr,
    )


def features_for(pools: Sequence[Pool], selectors: Sequence[Selector]) -> list[PoolFeatures]:
    """What the selector of each pool would know about it; the pools are of one LLM or several."""
    decodings = {id(selector): selector.decoding_in(pools) for selector in selectors}
    return [features_of(pool, decodings[id(selector)]) for pool, selector in zip(pools, selectors, strict=True)]
