"""The selectors: rules that pick one candidate of a pool, in the order of a report.

Each assigns a value to every candidate, without references or labels (except the oracle), and the highest value is
picked. If several candidates share it, the first of them is picked, but a selector is evaluated by the mean of their
labels, because their order is arbitrary.

To add one, add an entry to `SELECTORS` and a test. Evaluation, report and gate use the properties of the entry.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cappy.records import Candidate
from cappy.selection.pools import Pool, PoolVectors, Vector, best_of_n_curve, mbr_curve, pick_label, pick_labels

WEIGHTS = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Weights to try for the other value in a combined selector; weight 0 is the scorer alone."""
_GREEDY = re.compile(r"\b(greedy|temperature0)(?![\w.])", re.IGNORECASE)
"""Names of greedy decodings; an endpoint decodes greedily at temperature 0.0, in a decoding of that name."""

Curve = Callable[[Pool, Vector, np.random.Generator], Vector]
"""(pool, values, random generator) -> expected label of the pick among n candidates of the pool, for n from 1."""
ReportSection = Literal["table", "tasks", "examples", "verdict"]


class UnavailableError(Exception):
    """A selector is not available on these pools; the message says why."""


@dataclass(frozen=True)
class FittedSelector:
    """A fitted selector: a function from a pool to the values of its candidates, and the fitted choice as text."""

    values: Callable[[Pool], Vector]
    detail: str = ""


Fit = Callable[[Sequence[Pool], Sequence[Pool]], FittedSelector]
"""(held-out pools, pools) -> the fitted selector; see `Selector`."""


@dataclass(frozen=True, kw_only=True)
class Selector:
    """A rule that picks one candidate of a pool.

    `fit(held_out, pools)` fits on the labels of the held-out pools; it must not use the labels of `pools`. It raises
    UnavailableError if the selector is not available on these pools.

    `name` is used in report.json, `title` in tables and `sentence_name` (or else `title`) in sentences, followed by
    `remark` at the first mention. Of the selectors with the same `variant_of`, the one that is better on the reported
    pools represents them in comparisons. `scorer` names the scorer whose scores the selector uses. `bound` marks a
    lower or upper bound of what selection can reach, and `single_decoding` a response that a user can get without
    selection.

    `shown_in` are the report sections that show it besides the list of all selectors: the terminal's table, the table
    by task, the examples, and the verdict's comparisons with the scorer. `curve` computes its best-of-n curve. If
    `compared`, the scorer is compared with it; it is itself compared with each of `against`. `must_beat` says when the
    gate requires the first registered version of a scorer to beat it: always, only if the report compares with it, or
    on request (--baseline).
    """

    name: str
    title: str
    fit: Fit
    sentence_name: str = ""
    remark: str = ""
    variant_of: str = ""
    scorer: Literal["", "scorer", "champion"] = ""
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
    """Each selector's values on some pools and its fitted choice as text, or the reason why it is unavailable."""

    values: Mapping[str, PoolVectors]
    details: Mapping[str, str]
    unavailable: Mapping[str, str]


def select(held_out: Sequence[Pool], pools: Sequence[Pool]) -> Selection:
    """Fits every available selector on the held-out pools and computes its values on `pools`."""
    values, details, unavailable = {}, {}, {}
    for name, selector in SELECTORS.items():
        try:
            fitted = selector.fit(held_out, pools)
        except UnavailableError as error:
            unavailable[name] = str(error)
            continue
        values[name] = [fitted.values(pool) for pool in pools]
        if fitted.detail:
            details[name] = fitted.detail
    return Selection(values, details, unavailable)


def title(name: str) -> str:
    """The title for the name of a selector, or for a comparison key such as `likelihood`."""
    if name in SELECTORS:
        return SELECTORS[name].title
    return f"better {name}" if any(selector.variant_of == name for selector in SELECTORS.values()) else name


def selectors_shown_in(names: Iterable[str], section: ReportSection, better: str = "") -> list[Selector]:
    """The named selectors that a section of the report shows, in order; of variants, only the `better` one."""
    selectors = [SELECTORS[name] for name in names if name in SELECTORS]
    return [each for each in selectors if section in each.shown_in and (not each.variant_of or each.name == better)]


def compared_pairs() -> list[tuple[str, str]]:
    """The comparisons of a report as pairs of keys: the scorer with others, then the selectors with `against`."""
    keys = dict.fromkeys(selector.key for selector in SELECTORS.values() if selector.compared)
    more = [(selector.name, rival) for selector in reversed([*SELECTORS.values()]) for rival in selector.against]
    return [*(("scorer", key) for key in keys), *more]


def choose_weight(scores: PoolVectors, others: PoolVectors, labels: PoolVectors) -> float:
    """The smallest weight of `WEIGHTS` for which picks by score + weight * other have the best mean label."""

    def mean_label(weight: float) -> float:
        rows = zip(scores, others, labels, strict=True)
        return float(np.mean([pick_label(score + weight * other, label) for score, other, label in rows]))

    return max(WEIGHTS, key=mean_label)


def choose_system(pools: Sequence[Pool], among: Collection[str] | None = None) -> str | None:
    """The generator and decoding whose first candidate has the best mean label; None if no candidate names one.

    `among` restricts the choice to these systems.
    """
    names = dict.fromkeys(_system_name(candidate) for pool in pools for candidate in pool.candidates)
    names.pop("", None)
    if among is not None:
        names = {name: None for name in names if name in among}

    def mean_label(name: str) -> float:
        return float(pick_labels(pools, [prefer_system(pool, name) for pool in pools]).mean())

    return max(names, key=mean_label, default=None)


def _system_name(candidate: Candidate) -> str:
    """The generator and decoding of a candidate; empty if neither is known."""
    return f"{candidate.generator} {candidate.decoding}".strip()


def prefer_system(pool: Pool, name: str) -> Vector:
    """Values that pick the first candidate of the system, or of the pool if the system has none in it."""
    is_other = np.array([_system_name(candidate) != name for candidate in pool.candidates])
    values: Vector = _first_values(pool) - len(pool.candidates) * is_other
    return values


def _first_values(pool: Pool) -> Vector:
    """Values that pick the first candidate."""
    order: Vector = -np.arange(len(pool.candidates), dtype=np.float64)
    return order


def response_lengths(pool: Pool) -> Vector:
    """Length of every response in characters."""
    return np.array([len(response) for response in pool.responses], dtype=np.float64)


def _without_fitting(values: Callable[[Pool], Vector]) -> Fit:
    return lambda held_out, pools: FittedSelector(values)


def _fit_scores(name: str) -> Fit:
    def fit(held_out: Sequence[Pool], pools: Sequence[Pool]) -> FittedSelector:
        if any(name not in pool.scores for pool in pools):
            raise UnavailableError("none was given")
        return FittedSelector(lambda pool: pool.scores[name])

    return fit


def _read_likelihoods(likelihood: Callable[[Pool], Vector | None], pools: Sequence[Pool]) -> list[Vector]:
    """The likelihoods of all candidates. Raises UnavailableError if one has none."""
    likelihoods = [likelihood(pool) for pool in pools]
    complete = [values for values in likelihoods if values is not None]
    if len(complete) < len(likelihoods):
        missing = len(likelihoods) - len(complete)
        raise UnavailableError(f"{missing} of {len(likelihoods)} instances have candidates without log-likelihood")
    return complete


def _fit_likelihood(likelihood: Callable[[Pool], Vector | None]) -> Fit:
    def fit(held_out: Sequence[Pool], pools: Sequence[Pool]) -> FittedSelector:
        _read_likelihoods(likelihood, pools)
        return FittedSelector(lambda pool: _read_likelihoods(likelihood, [pool])[0])

    return fit


def _fit_mbr(held_out: Sequence[Pool], pools: Sequence[Pool]) -> FittedSelector:
    if all(pool.is_choice for pool in pools):
        raise UnavailableError("a closed set of choices has no consensus")
    return FittedSelector(lambda pool: pool.mbr)


def _fit_best_system(held_out: Sequence[Pool], pools: Sequence[Pool]) -> FittedSelector:
    if not held_out:
        raise UnavailableError("there are no held-out instances to choose it on")
    name = choose_system(held_out)
    if name is None:
        raise UnavailableError("no candidate names its generator")
    return FittedSelector(lambda pool: prefer_system(pool, name), name)


def _fit_greedy(held_out: Sequence[Pool], pools: Sequence[Pool]) -> FittedSelector:
    """Picks the greedy response; if several generators have one, that of the best generator on the held-out pools."""
    systems = set.intersection(
        *({name for name in map(_system_name, pool.candidates) if _GREEDY.search(name)} for pool in pools)
    )
    if not systems:
        raise UnavailableError("not every instance has a greedy response")
    name = choose_system(held_out, among=systems) or min(systems)
    return FittedSelector(lambda pool: prefer_system(pool, name), name)


def _combine_with_scorer(other: str, fit_other: Fit, values_of: Callable[[Sequence[Pool]], list[Vector]]) -> Fit:
    """The scorer's score plus a fitted weight times another selector's value, both unscaled."""

    def fit(held_out: Sequence[Pool], pools: Sequence[Pool]) -> FittedSelector:
        for name, part in (("scorer", _fit_scores("scorer")), (other, fit_other)):
            try:
                part(held_out, pools)
            except UnavailableError as error:
                raise UnavailableError(f"needs {name}, which is missing") from error
        if not held_out:
            raise UnavailableError("there are no held-out instances to fit its weight on")
        try:
            others = values_of(held_out)
        except UnavailableError as error:
            raise UnavailableError(f"on the held-out split, {error}") from error
        scores = [pool.scores["scorer"] for pool in held_out]
        weight = choose_weight(scores, others, [pool.labels for pool in held_out])
        return FittedSelector(lambda pool: pool.scores["scorer"] + weight * values_of([pool])[0], f"weight {weight:g}")

    return fit


def _curve_by_value(pool: Pool, values: Vector, generator: np.random.Generator) -> Vector:
    return best_of_n_curve(values, pool.labels)


SELECTORS: Mapping[str, Selector] = {
    selector.name: selector
    for selector in (
        Selector(
            name="random",
            title="random choice",
            fit=_without_fitting(lambda pool: np.zeros(len(pool.candidates))),
            bound="lower",
            shown_in=("table", "tasks", "verdict"),
            curve=lambda pool, values, generator: np.full(1, pool.labels.mean()),
            must_beat="always",
        ),
        Selector(name="first", title="first response", fit=_without_fitting(_first_values), shown_in=("examples",)),
        Selector(
            name="shortest",
            title="shortest",
            fit=_without_fitting(lambda pool: -response_lengths(pool)),
            shown_in=(),
            compared=False,
        ),
        Selector(name="longest", title="longest", fit=_without_fitting(response_lengths)),
        Selector(
            name="best_system",
            title="best single system",
            sentence_name="the best single system",
            fit=_fit_best_system,
            single_decoding=True,
        ),
        Selector(
            name="greedy",
            title="greedy response",
            sentence_name="the greedy response",
            remark=", which needs no samples",
            fit=_fit_greedy,
            single_decoding=True,
            shown_in=("table", "verdict"),
        ),
        *(
            Selector(
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
        Selector(
            name="mbr",
            title="MBR",
            remark=", the consensus of the pool, which needs no training",
            fit=_fit_mbr,
            shown_in=("table", "tasks", "examples", "verdict"),
            curve=lambda pool, values, generator: mbr_curve(pool.responses, pool.labels, generator),
            against=("random", "likelihood"),
            must_beat="on_request",
        ),
        Selector(
            name="champion",
            title="champion",
            sentence_name="the champion",
            fit=_fit_scores("champion"),
            scorer="champion",
            shown_in=("table", "tasks", "verdict"),
            curve=_curve_by_value,
        ),
        Selector(
            name="scorer",
            title="scorer",
            fit=_fit_scores("scorer"),
            scorer="scorer",
            shown_in=("table", "tasks", "examples"),
            curve=_curve_by_value,
            compared=False,
        ),
        Selector(
            name="hybrid_likelihood",
            title="scorer + likelihood",
            fit=_combine_with_scorer(
                "likelihood_mean",
                _fit_likelihood(lambda pool: pool.likelihood_mean),
                lambda pools: _read_likelihoods(lambda pool: pool.likelihood_mean, pools),
            ),
            scorer="scorer",
            compared=False,
            against=("scorer",),
        ),
        Selector(
            name="hybrid_mbr",
            title="scorer + MBR",
            fit=_combine_with_scorer("mbr", _fit_mbr, lambda pools: [pool.mbr for pool in pools]),
            scorer="scorer",
            shown_in=("table", "tasks"),
            compared=False,
            against=("mbr", "scorer"),
        ),
        Selector(
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
