"""The advice: what to do next, in one sentence with its reason."""

from cappy.evaluation.findings import MIN_GROUPS, Difference
from cappy.evaluation.report import Report, spread
from cappy.pages.words import percent, signed

NARROW = 0.01
"""Room between the best selector and the oracle, below which a better scorer cannot gain a point."""
FLAT = 0.01
"""Difference of an instance's highest and lowest score, on the scale of 0 to 1, below which a scorer hardly judges."""
UNTRAINED = {
    "scorer-random": "random choice",
    "scorer-likelihood": "the better likelihood selector",
    "scorer-greedy": "the greedy response",
    "scorer-best_system": "the best single system",
}
"""What a first version must beat to be promoted, where it is compared with it; see `cappy.registry.gate`."""


def advice(report: Report) -> str:
    """One sentence. What is decided by evidence comes first: leaks, then proof, then what would bring proof.

    It begins with "Promote" only where the gate's rule, without options of its own, would let the scorer pass.
    """
    text = _advice(report)
    if not text.startswith("Promote"):
        return text
    if report.split == "validation":
        return (
            "Hold: the validation split decided when training stopped, so it proves nothing; evaluate on --split test."
        )
    if report.facts["groups"] < MIN_GROUPS:
        return (
            f"Hold: {report.facts['groups']} groups of instances decide nothing, it takes {MIN_GROUPS}; prepare more "
            "test instances, or evaluate with --folds 5, which tests on all of them."
        )
    return text


def _advice(report: Report) -> str:
    if leaked := [name for name, count in report.leaks.items() if count]:
        who = " and the ".join(leaked)
        return f"Hold: the {who} saw reported instances in training; prepare splits that share none, then train again."
    if "scorer" not in report.selectors:
        return _without_scorer(report)
    if "champion" in report.selectors:
        return _against_champion(report)
    if why := _no_champion(report):
        return f"Hold: the report does not compare with the champion: {why}."
    if _worse(report, "scorer-greedy") and not _mbr_leads(report):
        return _greedy(report)
    for key, other in UNTRAINED.items():
        if key == "scorer-best_system" and "scorer-greedy" in report.comparisons:
            continue
        if key in report.comparisons and not _better(report, key):
            return _below(report, key, other)
    return _against_mbr(report)


def _no_champion(report: Report) -> str:
    """Why a champion that was given is not in the report; empty where none was given."""
    why = report.unavailable.get("champion", "")
    return "" if why == "none was given" else why


def _greedy(report: Report) -> str:
    """One call without any selection does better than the scorer."""
    lost = report.comparisons["scorer-greedy"]
    text = f"Use one greedy response: the scorer's pick of several is below it, by {_told(lost)}"
    return f"{text}; {_more_of_a_scorer(report)} before you sample more than one."


def _without_scorer(report: Report) -> str:
    if "mbr" in report.selectors and _better(report, "mbr-random"):
        gain = signed(report.comparisons["mbr-random"].difference)
        return f"Use MBR meanwhile, it is {gain} above random choice without training; then train a scorer to beat it."
    return "Train a scorer (cappy finetuning): no selector that needs none is shown to beat random choice."


def _against_champion(report: Report) -> str:
    difference = report.comparisons["scorer-champion"]
    if _better(report, "scorer-champion"):
        return f"Promote: the scorer beats the champion by {_told(difference)}."
    if difference.high < 0:
        return f"Hold: the scorer does worse than the champion, by {_told(difference)}."
    return _unproven(report, "scorer-champion", "the champion")


def _below(report: Report, key: str, other: str) -> str:
    """What the gate asks a first version to beat, and this one does not."""
    if _mbr_leads(report) and not _better(report, "scorer-mbr"):
        gain = _told(report.comparisons["mbr-random"])
        lacking = f"the scorer {'does worse than' if _worse(report, key) else 'is not shown to beat'} {other}"
        return (
            f"Use MBR: it beats random choice by {gain} without training, and {lacking}; {_more_of_a_scorer(report)}."
        )
    if _flat(report):
        otherwise = ", or use MBR" if "mbr" in report.selectors else ""
        return f"Hold: the scorer is not shown to beat {other}; {_more_of_a_scorer(report)}{otherwise}."
    if key == "scorer-random" and _worse(report, key):
        return "Hold: the scorer does worse than random choice; look at the worst instances and at the labels first."
    if _worse(report, key):
        lost = _told(report.comparisons[key])
        return f"Hold: the scorer is below {other} by {lost}; {_more_of_a_scorer(report)}."
    return _unproven(report, key, other)


def _mbr_leads(report: Report) -> bool:
    """Whether MBR is shown to beat random choice, and nothing else that needs no training has a better result."""
    others = {"greedy", report.better_likelihood} & {*report.selectors}
    if not _better(report, "mbr-random"):
        return False
    best = max((report.selectors[name].estimate.mean for name in others), default=0.0)
    return report.selectors["mbr"].estimate.mean >= best


def _more_of_a_scorer(report: Report) -> str:
    """What would make the scorer better."""
    if not _flat(report):
        return "train on more instances"
    spread_of = report.calibration.spread if report.calibration is not None else None
    return (
        "the scorer hardly tells an instance's responses apart (their scores differ by "
        f"{100 * (spread_of or 0.0):.2g} of 100 in the median), which more data of this kind seldom mends: train from "
        "a larger encoder"
    )


def _flat(report: Report) -> bool:
    """Whether the scorer gives all responses of an instance about the same score."""
    found = report.calibration
    return found is not None and found.spread is not None and found.spread < FLAT


def _against_mbr(report: Report) -> str:
    """The gate is open; what is the best use of the scorer?"""
    against, hybrid = report.comparisons.get("scorer-mbr"), report.comparisons.get("hybrid_mbr-mbr")
    if hybrid is not None and hybrid.low > 0 and against is not None and against.low <= 0:
        detail = report.selectors["hybrid_mbr"].detail
        return f"Promote, and pick by scorer + MBR ({detail}): together they beat MBR by {_told(hybrid)}."
    if against is not None and against.high < 0:
        return f"Use MBR: the scorer is below it by {_told(against)}; {_more_of_a_scorer(report)} before you promote."
    if against is not None and against.low <= 0:
        return f"Promote if MBR is no choice for you; {_lower(_unproven(report, 'scorer-mbr', 'MBR'))}"
    if all(task.kind == "choice" for task in report.tasks):
        return "Promote: the scorer beats random choice and what needs no training among these choices."
    if _room(report) < NARROW:
        room = percent(_room(report))
        return f"Promote, and sample other candidates: the oracle is only {room} above the best selector."
    if _rising(report):
        last, gain = len(report.curve["scorer"]), percent(_last_gain(report))
        return f"Promote, and sample more: candidate {last} still adds {gain}."
    return "Promote: the scorer beats random choice, the likelihood and MBR, as far as they were at hand."


def _unproven(report: Report, key: str, other: str) -> str:
    """What would bring proof; more data alone only where so many groups can be had, and the scorer tells them apart."""
    difference, power = report.comparisons[key], report.power[key]
    if difference.low == difference.high == 0:
        return f"Hold: the scorer does exactly as well as {other}, no better; train on more instances or another loss."
    if _flat(report):
        return f"Hold: the scorer is not shown to beat {other}, {_told(difference)}; {_more_of_a_scorer(report)}."
    needed = power.groups_needed
    if difference.difference > 0 and needed is not None and power.within_reach:
        return (
            f"More data: {signed(difference.difference)} against {other} is not proven on {power.groups} groups, "
            f"about {max(needed, power.groups + 1, MIN_GROUPS):,} would show it."
        )
    return (
        f"Hold: the scorer is not shown to beat {other}, {_told(difference)}, and {power.groups} groups show no "
        f"difference below {percent(power.smallest)}; train on more instances or another loss."
    )


def _rising(report: Report) -> bool:
    return report.pays_until == len(report.curve["scorer"]) > 1


def _last_gain(report: Report) -> float:
    return report.curve["scorer"][-1].mean - report.curve["scorer"][-2].mean


def _room(report: Report) -> float:
    """How far the oracle is above the best selector, 0 to 1."""
    best = max(row.estimate.mean for name, row in report.selectors.items() if name != "oracle")
    return report.selectors["oracle"].estimate.mean - best


def _better(report: Report, key: str) -> bool:
    """Whether the first is shown to be better; a difference that does not vary shows nothing."""
    found = report.comparisons.get(key)
    return found is not None and found.low > 0 and bool(found.standard_error)


def _worse(report: Report, key: str) -> bool:
    return key in report.comparisons and report.comparisons[key].high < 0


def _told(difference: Difference) -> str:
    return f"{signed(difference.difference)} (95% interval {spread(difference)})"


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]
