"""Fits the selector on pools with labels and the scores of a scorer that was not trained on them.

The weights of a set of features maximise the expected label of a pick that is drawn from the softmax of the values
(minimum risk training; Smith and Eisner, 2006), minus an L2 penalty. They are used only if cross-validation shows that
they beat the best single feature by one standard error; otherwise the rule picks by that feature.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cappy.selection.linear import FEATURE_SETS, SCORE_RULE, Evidence, Feature, Rule, Selector, features_of
from cappy.selection.pools import Pool, Vector, choose_decoding, pick_label

PENALTY = 1e-3
"""Weight of the L2 penalty; on two pools of 400 instances, 1e-4 to 1e-2 differ by less than 0.3 (labels x 100)."""
NUM_FOLDS = 5
MIN_GROUPS = 20
"""Minimum number of groups to fit a rule on; with fewer, a rule for fewer features is used."""


def fit_selector(pools: Sequence[Pool], *, metric: str, evidence: Evidence, scorer: str = "") -> Selector:
    """Fits a rule for every set of features on pools with labels and scores of a scorer that was not trained on them.

    A set that fewer than `MIN_GROUPS` groups have gets no rule. The result is deterministic.
    """
    groups = [pool.instance.group_id for pool in pools]
    count = len(set(groups))
    if count < MIN_GROUPS:
        return Selector(metric=metric, groups=count, scorer=scorer)
    decoding = choose_decoding(pools) or ""
    rules = (_fit_rule(pools, names, decoding) for names in FEATURE_SETS)
    return Selector(
        rules=tuple(rule for rule in rules if rule is not None),
        metric=metric,
        groups=count,
        evidence=evidence,
        scorer=scorer,
        decoding=decoding,
    )


def out_of_fold_selectors(pools: Sequence[Pool], *, metric: str) -> list[Selector] | None:
    """For each pool, a selector that was fitted on other groups; None if there are too few groups for that."""
    groups = sorted({pool.instance.group_id for pool in pools})
    if len(groups) * (NUM_FOLDS - 1) < MIN_GROUPS * NUM_FOLDS:
        return None
    order = np.random.default_rng(0).permutation(len(groups)) % NUM_FOLDS
    fold_of = dict(zip(groups, order.tolist(), strict=True))
    selectors = [
        fit_selector(
            [pool for pool in pools if fold_of[pool.instance.group_id] != fold], metric=metric, evidence="out-of-fold"
        )
        for fold in range(NUM_FOLDS)
    ]
    return [selectors[fold_of[pool.instance.group_id]] for pool in pools]


def _fit_rule(pools: Sequence[Pool], names: tuple[Feature, ...], decoding: str) -> Rule | None:
    """The rule for these features; None if too few pools have them."""
    known = [pool for pool in pools if features_of(pool, decoding).available.issuperset(names)]
    groups = np.array([pool.instance.group_id for pool in known])
    if len(set(groups.tolist())) < MIN_GROUPS:
        return SCORE_RULE if names == ("score",) else None
    examples = _examples(known, names, decoding)
    single = best_single(examples, len(names))
    scales = tuple(_mean_spread([features_of(pool, decoding).column(name) for pool in known]) for name in names)
    scales = tuple(1.0 if name == "greedy" else scale for name, scale in zip(names, scales, strict=True))
    rule = Rule(features=names, weights=tuple(single.tolist()), scales=scales, groups=len(set(groups.tolist())))
    if len(names) > 1:
        gain, error = _cross_validate(known, names, groups, {decoding: examples})
        weights = _maximize(examples, len(names)) if gain > error else single
        rule = replace(rule, weights=tuple(weights.tolist()), gain=gain, standard_error=error)
    rule = replace(rule, weights=tuple(map(_round, rule.weights)), scales=tuple(map(_round, rule.scales)))
    slope = _label_slope(examples, np.array(rule.weights))
    gain, error = round(rule.gain, 4), round(rule.standard_error, 4)
    return replace(rule, label_slope=_round(slope), gain=gain, standard_error=error)


def _round(value: float) -> float:
    """Rounded to 3 digits, so that rounding errors of the scores do not make another selector, and another version."""
    return float(f"{value:.3g}")


def _examples(pools: Sequence[Pool], names: tuple[Feature, ...], decoding: str) -> "list[Example]":
    return [Example(features_of(pool, decoding).matrix(names), pool.labels) for pool in pools]


@dataclass(frozen=True)
class Example:
    """The features of a pool, shape (candidates, features), and its labels, shape (candidates,)."""

    features: npt.NDArray[np.float64]
    labels: Vector


def _cross_validate(
    pools: Sequence[Pool],
    names: tuple[Feature, ...],
    groups: npt.NDArray[np.str_],
    by_decoding: dict[str, list[Example]],
) -> tuple[float, float]:
    """The gain of fitted weights over the best single feature, and its standard error over groups.

    The single feature, the single decoding and the weights are all chosen on the other folds. `by_decoding` has the
    examples of decodings that are known already; others are added.
    """
    unique, group_index = np.unique(groups, return_inverse=True)
    fold_of = (np.random.default_rng(0).permutation(len(unique)) % NUM_FOLDS)[group_index]
    gains = np.zeros(len(pools))
    for fold in range(NUM_FOLDS):
        others = np.flatnonzero(fold_of != fold).tolist()
        decoding = next(iter(by_decoding))
        if "greedy" in names:
            decoding = choose_decoding([pools[index] for index in others]) or ""
        if decoding not in by_decoding:
            by_decoding[decoding] = _examples(pools, names, decoding)
        examples = by_decoding[decoding]
        training = [examples[index] for index in others]
        fitted, single = _maximize(training, len(names)), best_single(training, len(names))
        for index in np.flatnonzero(fold_of == fold).tolist():
            features, labels = examples[index].features, examples[index].labels
            gains[index] = pick_label(features @ fitted, labels) - pick_label(features @ single, labels)
    sums = np.bincount(group_index, weights=gains - gains.mean())
    return float(gains.mean()), float(np.sqrt((sums**2).sum()) / len(gains))


def best_single(examples: Sequence[Example], count: int) -> Vector:
    """Weight 1 for the feature whose picks have the best mean label, the first of equals."""
    means = [
        np.mean([pick_label(each.features[:, column], each.labels) for each in examples]) for column in range(count)
    ]
    weights: Vector = np.eye(count)[int(np.argmax(means))]
    return weights


def _maximize(examples: Sequence[Example], count: int) -> Vector:
    """The weights with the highest expected label under the softmax of the values, minus the penalty.

    The objective is not concave, so it is maximised from two starts.
    """
    from scipy.optimize import minimize

    features, labels, is_candidate = _pad([each for each in examples if np.ptp(each.labels) > 0], count)

    def loss(weights: Vector) -> tuple[float, Vector]:
        values = np.where(is_candidate, features @ weights, -np.inf)
        shares = np.exp(values - values.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        expected = (shares * labels).sum(axis=1, keepdims=True)
        gradient = np.einsum("pc,pcf->f", shares * (labels - expected), features)
        pools = max(1, len(labels))
        return (
            float(PENALTY * weights @ weights - expected.sum() / pools),
            2 * PENALTY * weights - gradient / pools,
        )

    starts = (np.zeros(count), np.ones(count))
    # A feature that seems to hurt is noise: each of them is a reason to pick a candidate.
    bounds = [(0.0, None)] * count
    results = [minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds) for start in starts]
    best: Vector = np.asarray(min(results, key=lambda result: float(result.fun)).x, dtype=np.float64)
    return best


def _pad(
    examples: Sequence[Example], count: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Features (pools, candidates, features), labels (pools, candidates), and which entries are candidates."""
    size = max((len(each.labels) for each in examples), default=1)
    features, labels = np.zeros((len(examples), size, count)), np.zeros((len(examples), size))
    is_candidate = np.zeros((len(examples), size), dtype=np.bool_)
    for index, each in enumerate(examples):
        features[index, : len(each.labels)] = each.features
        labels[index, : len(each.labels)] = each.labels
        is_candidate[index, : len(each.labels)] = True
    return features, labels, is_candidate


def _mean_spread(columns: Sequence[Vector]) -> float:
    """The mean standard deviation of a feature within a pool; 1 if it never varies."""
    return float(np.mean([column.std() for column in columns])) or 1.0


def _label_slope(examples: Sequence[Example], weights: Vector) -> float:
    """Slope of the regression of labels on values, both minus their mean in the pool; at least 0."""
    values = [each.features @ weights for each in examples]
    deviations = np.concatenate([value - value.mean() for value in values])
    labels = np.concatenate([each.labels - each.labels.mean() for each in examples])
    variance = float(deviations @ deviations)
    return max(0.0, float(deviations @ labels) / variance) if variance else 0.0
