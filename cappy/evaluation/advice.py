"""The advice: what to do next, in one sentence with its reason."""

from cappy.evaluation.findings import Difference
from cappy.evaluation.report import Report, spread
from cappy.pages.words import percent, signed

NARROW = 0.01
"""Room between the best selector and the oracle, below which a better scorer cannot gain a point."""
UNTRAINED = {"scorer-random": "random choice", "scorer-likelihood": "the better likelihood selector"}
"""What a first version must beat to be promoted; see `cappy.registry.gate`."""


def advice(report: Report) -> str:
    """One sentence. What is decided by evidence comes first: leaks, then proof, then what would bring proof."""
    text = _advice(report)
    if report.folds and text.startswith("Promote"):
        return "Keep the recipe: evaluate the scorer that it made on the scorer's own test split, to promote that one."
    return text


def _advice(report: Report) -> str:
    if leaked := [name for name, count in report.leaks.items() if count]:
        who = " and the ".join(leaked)
        return f"Hold: the {who} saw reported prompts in training; prepare splits that share none, then train again."
    if "scorer" not in report.selectors:
        return _without_scorer(report)
    if _worse(report, "scorer-random"):
        return "Hold: the scorer does worse than random choice; look at the worst instances and at the labels first."
    if "champion" in report.selectors:
        return _against_champion(report)
    for key, other in UNTRAINED.items():
        if key in report.comparisons and not _better(report, key):
            return _below(report, key, other)
    return _against_mbr(report)


def _without_scorer(report: Report) -> str:
    if "mbr" in report.selectors and _better(report, "mbr-random"):
        gain = signed(report.comparisons["mbr-random"].difference)
        return f"Use MBR meanwhile, it is {gain} above random choice without training; then train a scorer to beat it."
    return "Train a scorer (cappy finetuning): no selector that needs none is shown to beat random choice."


def _against_champion(report: Report) -> str:
    difference = report.comparisons["scorer-champion"]
    if difference.low > 0:
        return f"Promote: the scorer beats the champion by {_told(difference)}."
    if difference.high < 0:
        return f"Hold: the scorer does worse than the champion, by {_told(difference)}."
    return _unproven(report, "scorer-champion", "the champion")


def _below(report: Report, key: str, other: str) -> str:
    """What the gate asks a first version to beat, and this one does not."""
    if _worse(report, key):
        return f"Hold: the scorer is below {other} by {_told(report.comparisons[key])}; train on more instances."
    return _unproven(report, key, other)


def _against_mbr(report: Report) -> str:
    """The gate is open; what is the best use of the scorer?"""
    against, hybrid = report.comparisons.get("scorer-mbr"), report.comparisons.get("hybrid_mbr-mbr")
    if hybrid is not None and hybrid.low > 0 and against is not None and against.low <= 0:
        detail = report.selectors["hybrid_mbr"].detail
        return f"Promote, and pick by scorer + MBR ({detail}): together they beat MBR by {_told(hybrid)}."
    if against is not None and against.high < 0:
        return f"Use MBR: the scorer is below it by {_told(against)}; train on more instances before you promote."
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
    """What would bring proof."""
    difference, power = report.comparisons[key], report.power[key]
    if difference.low == difference.high == 0:
        return f"Hold: the scorer does exactly as well as {other}, no better; train on more instances or another loss."
    needed = power.groups_needed
    if difference.difference > 0 and needed is not None and power.within_reach:
        return (
            f"More data: {signed(difference.difference)} against {other} is not proven on {power.groups} groups, "
            f"about {max(needed, power.groups + 1):,} would show it."
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
    return key in report.comparisons and report.comparisons[key].low > 0


def _worse(report: Report, key: str) -> bool:
    return key in report.comparisons and report.comparisons[key].high < 0


def _told(difference: Difference) -> str:
    return f"{signed(difference.difference)} (95% interval {spread(difference)})"


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]
