"""Which selectors an evaluation has, with each one's value for every candidate, and why the others are missing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cappy.evaluation import selectors, tuning
from cappy.evaluation.pools import Pool, Vector

Values = Sequence[Vector]
"""The values of a selector: one vector per pool, one value per candidate."""


@dataclass(frozen=True)
class Rules:
    """Selector -> its values on the reported pools; what was chosen for it; selector -> why it is missing."""

    values: Mapping[str, Values]
    details: Mapping[str, str]
    unavailable: Mapping[str, str]


def rules(reported: Sequence[Pool], held_out: Sequence[Pool], scores: Mapping[str, Values], held: Values) -> Rules:
    """Every selector that can be had: `scores` by "scorer" and "champion" on the reported pools, `held` the scorer's
    on the held-out ones, where hybrid weights and the best single system are chosen."""
    values: dict[str, Values] = {
        "first": [selectors.first(pool.responses) for pool in reported],
        "shortest": [selectors.shortest(pool.responses) for pool in reported],
        "longest": [selectors.longest(pool.responses) for pool in reported],
        **scores,
        "oracle": [pool.labels for pool in reported],
    }
    details: dict[str, str] = {}
    missing = {name: "none was given" for name in ("scorer", "champion") if name not in scores}
    for name, found in {
        **_likelihoods(reported),
        "mbr": _mbr(reported),
        "best_system": _system(reported, held_out),
        "greedy": _greedy(reported, held_out),
    }.items():
        if isinstance(found, str):
            missing[name] = found
        else:
            values[name], details[name] = found
    for name, other in (("hybrid_mbr", "mbr"), ("hybrid_likelihood", "likelihood_mean")):
        reason = _without(other, values, held_out)
        tuned = "" if reason else _valued(other, held_out)
        if isinstance(tuned, str):
            missing[name] = reason or f"of the held-out, {tuned}"
            continue
        weight = tuning.choose_weight(held, tuned, [pool.labels for pool in held_out])
        pairs = zip(values["scorer"], values[other], strict=True)
        values[name] = [selectors.hybrid(score, value, weight) for score, value in pairs]
        details[name] = f"weight {weight:g}"
    return Rules(values, {name: text for name, text in details.items() if text}, missing)


def _likelihoods(pools: Sequence[Pool]) -> dict[str, tuple[Values, str] | str]:
    found = {name: _valued(name, pools) for name in ("likelihood_sum", "likelihood_mean")}
    return {name: values if isinstance(values, str) else (values, "") for name, values in found.items()}


def _valued(name: str, pools: Sequence[Pool]) -> list[Vector] | str:
    """The values of MBR or of a likelihood selector, or why there are none."""
    if name == "mbr":
        return [selectors.mbr(pool.responses) for pool in pools]
    rule: Callable[..., Vector | None] = getattr(selectors, name)
    found = [rule(pool.candidates) for pool in pools]
    known = [values for values in found if values is not None]
    if len(known) == len(found):
        return known
    return f"{len(found) - len(known)} of {len(found)} instances have candidates without log-likelihood"


def _mbr(pools: Sequence[Pool]) -> tuple[Values, str] | str:
    if all(pool.is_choice for pool in pools):
        return "a closed set of choices has no consensus"
    return [selectors.mbr(pool.responses) for pool in pools], ""


def _system(reported: Sequence[Pool], held_out: Sequence[Pool]) -> tuple[Values, str] | str:
    if not held_out:
        return "no held-out instances to choose it on"
    name = tuning.choose_system(held_out)
    if name is None:
        return "no candidate names its generator"
    return [selectors.system(pool.candidates, name) for pool in reported], name


def _greedy(reported: Sequence[Pool], held_out: Sequence[Pool]) -> tuple[Values, str] | str:
    """What a user has without any selection; of several generators' greedy responses the best one on held-out pools."""
    everywhere = set.intersection(
        *({selectors.system_of(one) for one in pool.candidates if selectors.is_greedy(one)} for pool in reported)
    )
    if not everywhere:
        return "not every instance has a greedy response"
    name = tuning.choose_system(held_out, among=everywhere) or min(everywhere)
    return [selectors.system(pool.candidates, name) for pool in reported], name


def _without(other: str, values: Mapping[str, Values], held_out: Sequence[Pool]) -> str:
    """Why a hybrid of the scorer and `other` cannot be had; empty if it can."""
    for name in ("scorer", other):
        if name not in values:
            return f"needs {name}, which is missing"
    return "" if held_out else "no held-out instances to choose its weight on"
