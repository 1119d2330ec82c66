"""The selectors: rules that pick one candidate of a pool, in the order of a report.

Each assigns a value to every candidate, without references or labels (except the oracle), and the highest value is
picked. If several candidates share it, the first of them is picked, but a selector is evaluated by the mean of their
labels, because their order is arbitrary.

To add one, add an entry to `SELECTORS` and a test. Evaluation, report and gate use the properties of the entry.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np

from cappy.selection.curves import best_of_n_curve, mbr_curve, sample_picks
from cappy.selection.linear import Feature, PoolFeatures, Selector, features_of
from cappy.selection.pools import MIN_SHARE, Pool, PoolVectors, Vector, choose_system, greedy_systems, system_index

Curve = Callable[[Pool, Vector, np.random.Generator], Vector]
"""(pool, values, random generator) -> expected label of the pick among n candidates of the pool, for n from 1."""
PoolCurve = Callable[[np.random.Generator], Vector]
"""`Curve` of one pool with its values."""
NOT_GIVEN = "none was given"
"""Why a scorer that the evaluation did not get is unavailable."""
ReportSection = Literal["table", "tasks", "examples", "verdict"]


class UnavailableError(Exception):
    """A selector is not available on these pools; the message says why."""


@dataclass(frozen=True)
class FittedSelector:
    """A fitted selector: a function from a pool to the values of its candidates, and the fitted choice as text.

    `curve` is its best-of-n curve if it does not follow from the values; see `SelectorSpec.curve`.
    """

    values: Callable[[Pool], Vector]
    detail: str = ""
    curve: Curve | None = None


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """What a selector may be fitted with: the held-out pools with their labels, and the tested pools without theirs.

    `selector` is the fitted selector of the scorer, and `champion` that of the champion.
    """

    held_out: Sequence[Pool]
    pools: Sequence[Pool]
    selector: Selector = field(default_factory=Selector)
    champion: Selector = field(default_factory=Selector)

    @property
    def decoding(self) -> str:
        """The single decoding of the tested pools that the fitted selector knows."""
        return self.selector.decoding_in(self.pools)


Fit = Callable[[Fitting], FittedSelector]
"""Fits a selector, without using the labels of the tested pools; see `SelectorSpec`."""


@dataclass(frozen=True, kw_only=True)
class SelectorSpec:
    """A rule that picks one candidate of a pool, and its place in the report.

    `fit` raises UnavailableError if the rule is not available on the tested pools.

    `name` is used in report.json, `title` in tables and `sentence_name` (or else `title`) in sentences, followed by
    `remark` at the first mention. Of the selectors with the same `variant_of`, the one that is better on the reported
    pools represents them in comparisons. `scorer` names the scorer whose scores the selector uses. `bound` marks a
    lower or upper bound of what selection can reach, and `single_decoding` a response that a user can get without
    selection.

    `shown_in` are the report sections that show it besides the list of all selectors: the terminal's table, the table
    by task, the examples, and the verdict's comparisons with the fitted selector. `curve` computes its best-of-n curve.
    If `compared`, the fitted selector is compared with it; it is itself compared with each of `against`. `must_beat`
    says when the gate requires the first registered version to beat it: always, only if the report compares with it,
    or on request (--baseline).
    """

    name: str
    title: str
    fit: Fit
    sentence_name: str = ""
    remark: str = ""
    variant_of: str = ""
    scorer: Literal["", "scorer", "champion", "initial"] = ""
    bound: Literal["", "lower", "upper"] = ""
    single_decoding: bool = False
    shown_in: tuple[ReportSection, ...] = ("table",)
    curve: Curve | None = None
    compared: bool = True
    against: tuple[str, ...] = ()
    must_beat: Literal["", "always", "where_compared", "on_request"] = ""

    @property
    def key(self) -> str:
        """Its key in comparisons."""
        return self.variant_of or self.name

    @property
    def name_in_sentence(self) -> str:
        """Its name in a sentence."""
        return self.sentence_name or self.title


@dataclass(frozen=True)
class Selection:
    """Each selector's values on some pools and its fitted choice as text, or the reason why it is unavailable.

    `curves` has the function that computes the best-of-n curve of each pool.
    """

    values: Mapping[str, PoolVectors]
    details: Mapping[str, str]
    unavailable: Mapping[str, str]
    curves: Mapping[str, Sequence[PoolCurve]] = field(default_factory=dict)


def select(fitting: Fitting) -> Selection:
    """Fits every available selector and computes its values on the tested pools."""
    values, details, unavailable, curves = {}, {}, {}, {}
    for name, selector in SELECTORS.items():
        try:
            fitted = selector.fit(fitting)
        except UnavailableError as error:
            unavailable[name] = str(error)
            continue
        values[name] = [fitted.values(pool) for pool in fitting.pools]
        if fitted.detail:
            details[name] = fitted.detail
        if curve := fitted.curve or selector.curve:
            pairs = zip(fitting.pools, values[name], strict=True)
            curves[name] = [partial(curve, pool, pool_values) for pool, pool_values in pairs]
    return Selection(values, details, unavailable, curves)


def title(name: str) -> str:
    """The title for the name of a selector, or for a comparison key such as `likelihood`."""
    if name in SELECTORS:
        return SELECTORS[name].title
    return f"better {name}" if any(selector.variant_of == name for selector in SELECTORS.values()) else name


def selectors_shown_in(names: Iterable[str], section: ReportSection, better: str = "") -> list[SelectorSpec]:
    """The named selectors that a section of the report shows, in order; of variants, only the `better` one."""
    selectors = [SELECTORS[name] for name in names if name in SELECTORS]
    return [each for each in selectors if section in each.shown_in and (not each.variant_of or each.name == better)]


def compared_pairs() -> list[tuple[str, str]]:
    """The comparisons of a report as pairs of keys: the fitted selector with others, then those with `against`."""
    keys = dict.fromkeys(selector.key for selector in SELECTORS.values() if selector.compared)
    more = [(selector.name, rival) for selector in reversed([*SELECTORS.values()]) for rival in selector.against]
    return [*(("selector", key) for key in keys), *more]


def _prefer(index: int | None, pool: Pool) -> Vector:
    """Values that pick the candidate at the index, or the first one if it is None."""
    values: Vector = (np.arange(len(pool.candidates)) == (index or 0)).astype(np.float64)
    return values


_pick_first = partial(_prefer, 0)


def _without_fitting(values: Callable[[Pool], Vector]) -> Fit:
    return lambda fitting: FittedSelector(values)


def _fit_scores(name: str, fitting: Fitting) -> FittedSelector:
    _require_scores(name, fitting)
    return FittedSelector(lambda pool: pool.scores[name])


def _require_scores(name: str, fitting: Fitting) -> None:
    """Raises UnavailableError if a pool lacks the scores of this scorer."""
    if any(name not in pool.scores for pool in fitting.pools):
        raise UnavailableError(NOT_GIVEN)


def _fit_champion(fitting: Fitting) -> FittedSelector:
    _require_scores("champion", fitting)
    decoding = fitting.champion.decoding_in(fitting.pools)
    known = [features_of(pool, decoding, "champion").available for pool in fitting.pools]
    names = "; ".join(dict.fromkeys(fitting.champion.rule(available).names for available in known))
    return FittedSelector(lambda pool: fitting.champion.values(features_of(pool, decoding, "champion")), names)


def _fit_selector(without: frozenset[Feature] = frozenset()) -> Fit:
    """The fitted selector, for a caller who lacks some features."""

    def fit(fitting: Fitting) -> FittedSelector:
        _require_scores("scorer", fitting)

        def features(pool: Pool) -> PoolFeatures:
            return features_of(pool, fitting.decoding).without(without)

        known = [features(pool).available for pool in fitting.pools]
        if without and not any(without & features_of(pool, fitting.decoding).available for pool in fitting.pools):
            raise UnavailableError("no instance has them")

        def curve(pool: Pool, values: Vector, rng: np.random.Generator) -> Vector:
            if fitting.selector.rule(features(pool).available).single == "score":
                return best_of_n_curve(values, pool.labels)
            picks = sample_picks(fitting.selector, features(pool), pool.labels, rng, greedy_first=True)
            expected: Vector = picks.labels.mean(axis=0)
            return expected

        rules = dict.fromkeys(fitting.selector.rule(available).names for available in known)
        return FittedSelector(
            lambda pool: fitting.selector.values(features(pool)), "; ".join(rules), None if without else curve
        )

    return fit


def _fit_likelihood(likelihood: Callable[[Pool], Vector | None]) -> Fit:
    def fit(fitting: Fitting) -> FittedSelector:
        missing, count = sum(likelihood(pool) is None for pool in fitting.pools), len(fitting.pools)
        text = f"{missing} of {count} instances have candidates without log-likelihood"
        if missing > (1 - MIN_SHARE) * count:
            raise UnavailableError(text)
        # A pool without likelihoods gets equal values: a random choice.
        return FittedSelector(
            lambda pool: np.zeros(len(pool.candidates)) if (known := likelihood(pool)) is None else known,
            text if missing else "",
        )

    return fit


def _fit_mbr(fitting: Fitting) -> FittedSelector:
    if all(pool.is_choice for pool in fitting.pools):
        raise UnavailableError("a closed set of choices has no consensus")
    return FittedSelector(lambda pool: pool.mbr)


def _fit_best_system(fitting: Fitting) -> FittedSelector:
    if not fitting.held_out:
        raise UnavailableError("there are no held-out instances to choose it on")
    name = choose_system(fitting.held_out)
    if name is None:
        raise UnavailableError("no candidate names its generator")
    return FittedSelector(lambda pool: _prefer(system_index(pool, name), pool), name)


def _fit_greedy(fitting: Fitting) -> FittedSelector:
    """Picks the greedy response; if several generators have one, that of the best generator on the held-out pools."""
    systems = greedy_systems(fitting.pools)
    if not systems:
        raise UnavailableError("too few instances have a greedy response")
    name = choose_system(fitting.held_out, among=systems) or min(systems)
    missing = sum(system_index(pool, name) is None for pool in fitting.pools)

    def values(pool: Pool) -> Vector:
        # Where the request failed or was refused, a random choice takes the place of the greedy response.
        index = system_index(pool, name)
        return np.zeros(len(pool.candidates)) if index is None else _prefer(index, pool)

    return FittedSelector(values, f"{name} (missing in {missing} instances)" if missing else name)


def _curve_by_value(pool: Pool, values: Vector, generator: np.random.Generator) -> Vector:
    return best_of_n_curve(values, pool.labels)


SELECTORS: Mapping[str, SelectorSpec] = {
    selector.name: selector
    for selector in (
        SelectorSpec(
            name="random",
            title="random choice",
            fit=_without_fitting(lambda pool: np.zeros(len(pool.candidates))),
            bound="lower",
            shown_in=("table", "tasks", "verdict"),
            curve=lambda pool, values, generator: np.full(1, pool.labels.mean()),
            must_beat="always",
        ),
        SelectorSpec(name="first", title="first response", fit=_without_fitting(_pick_first), shown_in=("examples",)),
        SelectorSpec(
            name="shortest",
            title="shortest",
            fit=_without_fitting(lambda pool: -pool.lengths),
            shown_in=(),
            compared=False,
        ),
        SelectorSpec(name="longest", title="longest", fit=_without_fitting(lambda pool: pool.lengths)),
        SelectorSpec(
            name="best_system",
            title="best single system",
            sentence_name="the best single system",
            fit=_fit_best_system,
            single_decoding=True,
        ),
        SelectorSpec(
            name="greedy",
            title="greedy response",
            sentence_name="the greedy response",
            remark=", which needs no samples",
            fit=_fit_greedy,
            single_decoding=True,
            shown_in=("table", "verdict"),
        ),
        *(
            SelectorSpec(
                name=f"likelihood_{kind}",
                title=title,
                sentence_name="the better likelihood selector",
                variant_of="likelihood",
                fit=_fit_likelihood(likelihood),
                shown_in=("table", "tasks", "verdict"),
                curve=_curve_by_value,
                must_beat="where_compared",
            )
            for kind, title, likelihood in (
                ("sum", "likelihood, sum", lambda pool: pool.likelihood_sum),
                ("mean", "likelihood, mean per token", lambda pool: pool.likelihood_mean),
            )
        ),
        SelectorSpec(
            name="mbr",
            title="MBR",
            remark=", the consensus of the pool, which needs no training",
            fit=_fit_mbr,
            shown_in=("table", "tasks", "examples", "verdict"),
            curve=lambda pool, values, generator: mbr_curve(pool.responses, pool.labels, generator),
            against=("random", "likelihood"),
            must_beat="on_request",
        ),
        SelectorSpec(
            name="initial",
            title="scorer before adaptation",
            sentence_name="the scorer before adaptation",
            fit=partial(_fit_scores, "initial"),
            scorer="initial",
            shown_in=("table", "tasks"),
            curve=_curve_by_value,
            compared=False,
        ),
        SelectorSpec(
            name="scorer",
            title="score alone",
            sentence_name="the scorer's score alone",
            fit=partial(_fit_scores, "scorer"),
            scorer="scorer",
            shown_in=("table", "tasks", "examples"),
            curve=_curve_by_value,
            against=("mbr", "initial"),
        ),
        SelectorSpec(
            name="champion",
            title="champion",
            sentence_name="the champion",
            fit=_fit_champion,
            scorer="champion",
            shown_in=("table", "tasks", "verdict"),
        ),
        SelectorSpec(
            name="selector_texts",
            title="selector, texts only",
            fit=_fit_selector(frozenset({"likelihood", "greedy"})),
            scorer="scorer",
            compared=False,
            against=("greedy",),
        ),
        SelectorSpec(
            name="selector_no_likelihood",
            title="selector, no likelihood",
            fit=_fit_selector(frozenset({"likelihood"})),
            scorer="scorer",
            compared=False,
            against=("greedy",),
        ),
        SelectorSpec(
            name="selector",
            title="selector",
            fit=_fit_selector(),
            scorer="scorer",
            shown_in=("table", "tasks", "examples"),
            compared=False,
        ),
        SelectorSpec(
            name="oracle",
            title="oracle",
            fit=_without_fitting(lambda pool: pool.labels),
            bound="upper",
            shown_in=("table", "tasks", "examples"),
            curve=_curve_by_value,
            compared=False,
        ),
    )
}
"""Every selector by name, in the order of a report."""
