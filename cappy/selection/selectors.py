"""The selectors: every rule that picks one candidate of a pool, in the order of a report.

Each gives every candidate a value, from what a user would have and never from references; the highest value is picked.
Of equal values a user gets the first, but which one stands first says nothing of the selector: its result is their mean
label.

To add one: an entry of `SELECTORS`, and a test. The evaluation, the report with its tables, page and plots, and the
gate go by the properties that stand there.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cappy.records import Candidate
from cappy.selection.pools import Pool, Values, Vector, best_of_n_curve, mbr_curve, pick_label, pick_labels

WEIGHTS = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""The weights that a combined selector may give the other value: 0 is the scorer alone."""
_GREEDY = re.compile(r"\b(greedy|temperature0)(?![\w.])", re.IGNORECASE)
"""An endpoint draws the most probable token at temperature 0.0, in a decoding of that name."""

Curve = Callable[[Pool, Vector, np.random.Generator], Vector]
"""(pool, values, generator) -> the label to expect of the pick among n candidates of the pool, by n from 1."""
Place = Literal["table", "tasks", "examples", "verdict"]


class UnavailableError(Exception):
    """A selector cannot be had on these pools; the text says why."""


@dataclass(frozen=True)
class FittedSelector:
    """A selector that is ready to pick: the values of a pool's candidates, and what was chosen for it, in a word."""

    values: Callable[[Pool], Vector]
    detail: str = ""


Fit = Callable[[Sequence[Pool], Sequence[Pool]], FittedSelector]


@dataclass(frozen=True, kw_only=True)
class Selector:
    """A rule that picks one candidate of a pool.

    `fit(held_out, pools)` chooses what there is to choose by the labels of the held-out pools; of the pools that it is
    for it sees what a user would have. UnavailableError where it cannot be had.

    `name` stands in report.json, `title` in tables; `words`, where given, in sentences, with `remark` behind it where
    the selector is introduced. Of selectors that are each a `variant_of` the same thing the better one on the reported
    pools stands for it. `scorer` names whose scores it uses, `bound` says that it is a bound of what selection can do,
    `single_decoding` that a user has it without selection.

    `shown_in` are the places beside the list of all: the terminal's table, the table by task, the examples, and the
    verdict's comparisons with the scorer. `curve` is for the plot of best-of-n. The scorer is compared with it where
    `compared`, and it with each of `against`. `must_beat` says whether a first version has to be proven better:
    always, where the report compares with it, or where the person who promotes asks for it.
    """

    name: str
    title: str
    fit: Fit
    words: str = ""
    remark: str = ""
    variant_of: str = ""
    scorer: Literal["", "scorer", "champion"] = ""
    bound: Literal["", "lower", "upper"] = ""
    single_decoding: bool = False
    shown_in: tuple[Place, ...] = ("table",)
    curve: Curve | None = None
    compared: bool = True
    against: tuple[str, ...] = ()
    must_beat: Literal["", "always", "where_compared", "on_request"] = ""

    @property
    def key(self) -> str:
        """Its name in a comparison."""
        return self.variant_of or self.name

    @property
    def in_words(self) -> str:
        """How a sentence names it."""
        return self.words or self.title


@dataclass(frozen=True)
class Selection:
    """Selector -> its values on some pools; what was chosen for it; selector -> why it is missing."""

    values: Mapping[str, Values]
    details: Mapping[str, str]
    unavailable: Mapping[str, str]


def select(held_out: Sequence[Pool], pools: Sequence[Pool]) -> Selection:
    """The values of every selector that can be had on `pools`, fitted on the held-out ones."""
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
    """How a table names the selector, or the comparison's side, with this name."""
    if name in SELECTORS:
        return SELECTORS[name].title
    return f"better {name}" if any(selector.variant_of == name for selector in SELECTORS.values()) else name


def selectors_shown_in(names: Iterable[str], place: Place, better: str = "") -> list[Selector]:
    """Those of the named selectors that are shown at the place, in their order; of variants the `better` one alone."""
    known = [SELECTORS[name] for name in names if name in SELECTORS]
    return [one for one in known if place in one.shown_in and (not one.variant_of or one.name == better)]


def compared_pairs() -> list[tuple[str, str]]:
    """The comparisons of a report, by their sides' keys: of the scorer with others, then of those with `against`."""
    keys = dict.fromkeys(selector.key for selector in SELECTORS.values() if selector.compared)
    others = [(selector.name, other) for selector in reversed([*SELECTORS.values()]) for other in selector.against]
    return [*(("scorer", key) for key in keys), *others]


def choose_weight(scores: Values, others: Values, labels: Values) -> float:
    """The weight of `WEIGHTS` with which picks by score + weight * other have the best mean label, the smallest one."""

    def mean_label(weight: float) -> float:
        rows = zip(scores, others, labels, strict=True)
        return float(np.mean([pick_label(score + weight * other, label) for score, other, label in rows]))

    return max(WEIGHTS, key=mean_label)


def choose_system(pools: Sequence[Pool], among: Collection[str] | None = None) -> str | None:
    """The generator and decoding whose first candidate has the best mean label; None where no candidate names one.

    `among` are the only ones to choose from, where given.
    """
    names = dict.fromkeys(_system_name(candidate) for pool in pools for candidate in pool.candidates)
    names.pop("", None)
    if among is not None:
        names = {name: None for name in names if name in among}

    def mean_label(name: str) -> float:
        return float(pick_labels(pools, [prefer_system(pool, name) for pool in pools]).mean())

    return max(names, key=mean_label, default=None)


def _system_name(candidate: Candidate) -> str:
    """The generator and decoding that a candidate came from; empty where neither is known."""
    return f"{candidate.generator} {candidate.decoding}".strip()


def prefer_system(pool: Pool, name: str) -> Vector:
    """The first candidate of the system, or of the pool where the system has none in it."""
    other = np.array([_system_name(candidate) != name for candidate in pool.candidates])
    values: Vector = _first_values(pool) - len(pool.candidates) * other
    return values


def _first_values(pool: Pool) -> Vector:
    """The order of the candidates: what a user without a selector takes."""
    order: Vector = -np.arange(len(pool.candidates), dtype=np.float64)
    return order


def response_lengths(pool: Pool) -> Vector:
    """Length in characters."""
    return np.array([len(response) for response in pool.responses], dtype=np.float64)


def _without_fitting(values: Callable[[Pool], Vector]) -> Fit:
    return lambda held_out, pools: FittedSelector(values)


def _fit_scores(name: str) -> Fit:
    def fit(held_out: Sequence[Pool], pools: Sequence[Pool]) -> FittedSelector:
        if any(name not in pool.scores for pool in pools):
            raise UnavailableError("none was given")
        return FittedSelector(lambda pool: pool.scores[name])

    return fit


def _known_likelihoods(likelihood: Callable[[Pool], Vector | None], pools: Sequence[Pool]) -> list[Vector]:
    """The likelihoods of all candidates; UnavailableError where one has none."""
    likelihoods = [likelihood(pool) for pool in pools]
    known = [values for values in likelihoods if values is not None]
    if len(known) < len(likelihoods):
        missing = len(likelihoods) - len(known)
        raise UnavailableError(f"{missing} of {len(likelihoods)} instances have candidates without log-likelihood")
    return known


def _fit_likelihood(likelihood: Callable[[Pool], Vector | None]) -> Fit:
    def fit(held_out: Sequence[Pool], pools: Sequence[Pool]) -> FittedSelector:
        _known_likelihoods(likelihood, pools)
        return FittedSelector(lambda pool: _known_likelihoods(likelihood, [pool])[0])

    return fit


def _fit_mbr(held_out: Sequence[Pool], pools: Sequence[Pool]) -> FittedSelector:
    if all(pool.is_choice for pool in pools):
        raise UnavailableError("a closed set of choices has no consensus")
    return FittedSelector(lambda pool: pool.mbr)


def _fit_best_system(held_out: Sequence[Pool], pools: Sequence[Pool]) -> FittedSelector:
    if not held_out:
        raise UnavailableError("no held-out instances to choose it on")
    name = choose_system(held_out)
    if name is None:
        raise UnavailableError("no candidate names its generator")
    return FittedSelector(lambda pool: prefer_system(pool, name), name)


def _fit_greedy(held_out: Sequence[Pool], pools: Sequence[Pool]) -> FittedSelector:
    """Of several generators' greedy responses the best one on held-out pools."""
    everywhere = set.intersection(
        *({_system_name(one) for one in pool.candidates if _GREEDY.search(_system_name(one))} for pool in pools)
    )
    if not everywhere:
        raise UnavailableError("not every instance has a greedy response")
    name = choose_system(held_out, among=everywhere) or min(everywhere)
    return FittedSelector(lambda pool: prefer_system(pool, name), name)


def _combine_with_scorer(other: str, fit_other: Fit, values_of: Callable[[Sequence[Pool]], list[Vector]]) -> Fit:
    """The scorer's score plus a weight times another selector's value, both as they are; the weight is fitted."""

    def fit(held_out: Sequence[Pool], pools: Sequence[Pool]) -> FittedSelector:
        for name, part in (("scorer", _fit_scores("scorer")), (other, fit_other)):
            try:
                part(held_out, pools)
            except UnavailableError as error:
                raise UnavailableError(f"needs {name}, which is missing") from error
        if not held_out:
            raise UnavailableError("no held-out instances to choose its weight on")
        try:
            others = values_of(held_out)
        except UnavailableError as error:
            raise UnavailableError(f"of the held-out, {error}") from error
        scores = [pool.scores["scorer"] for pool in held_out]
        weight = choose_weight(scores, others, [pool.labels for pool in held_out])
        return FittedSelector(lambda pool: pool.scores["scorer"] + weight * values_of([pool])[0], f"weight {weight:g}")

    return fit


def _rank_in_pool(pool: Pool, values: Vector, generator: np.random.Generator) -> Vector:
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
            words="the best single system",
            fit=_fit_best_system,
            single_decoding=True,
        ),
        Selector(
            name="greedy",
            title="greedy response",
            words="the greedy response",
            remark=", which needs no samples",
            fit=_fit_greedy,
            single_decoding=True,
            shown_in=("table", "verdict"),
        ),
        *(
            Selector(
                name=f"likelihood_{kind}",
                title=title,
                words="the better likelihood selector",
                variant_of="likelihood",
                fit=_fit_likelihood(likelihood),
                shown_in=("table", "tasks", "verdict"),
                curve=_rank_in_pool,
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
            words="the champion",
            fit=_fit_scores("champion"),
            scorer="champion",
            shown_in=("table", "tasks", "verdict"),
            curve=_rank_in_pool,
        ),
        Selector(
            name="scorer",
            title="scorer",
            fit=_fit_scores("scorer"),
            scorer="scorer",
            shown_in=("table", "tasks", "examples"),
            curve=_rank_in_pool,
            compared=False,
        ),
        Selector(
            name="hybrid_likelihood",
            title="scorer + likelihood",
            fit=_combine_with_scorer(
                "likelihood_mean",
                _fit_likelihood(lambda pool: pool.likelihood_mean),
                lambda pools: _known_likelihoods(lambda pool: pool.likelihood_mean, pools),
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
            curve=_rank_in_pool,
            compared=False,
        ),
    )
}
"""Every selector by name, in the order of a report."""
