"""The advice: what to do next, in one sentence with its reason."""

from cappy.evaluation.findings import Difference
from cappy.evaluation.report import Report
from cappy.pages.words import percent, signed

NARROW = 0.01
"""Room between the best selector and the oracle, below which a better scorer cannot gain a point."""
MANY = 20


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
    if not _better(report, "scorer-random"):
        return _unproven(report, "scorer-random", "random choice")
    if _low_room(report):
        return f"More candidates: the oracle is only {_room(report)} above the best selector, so no scorer gains more."
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


def _against_mbr(report: Report) -> str:
    against = report.comparisons.get("scorer-mbr")
    hybrid = report.comparisons.get("hybrid_mbr-mbr")
    if hybrid is not None and hybrid.low > 0 and not (against is not None and against.low > 0):
        detail = report.selectors["hybrid_mbr"].detail
        return f"Promote, and pick by scorer + MBR ({detail}): together they beat MBR by {_told(hybrid)}."
    if against is not None and against.high < 0:
        return f"Use MBR: the scorer is below it by {_told(against)}; train on more instances before you promote."
    if against is not None and against.low <= 0:
        return f"Promote if MBR is no choice for you; {_lower(_unproven(report, 'scorer-mbr', 'MBR'))}"
    if _rising(report):
        last = len(report.curve["scorer"])
        return f"Promote, and sample more: the {last}th candidate still adds {percent(_last_gain(report))}."
    return "Promote: the scorer beats random choice and every selector that needs no training."


def _unproven(report: Report, key: str, other: str) -> str:
    """What would bring proof."""
    difference, power = report.comparisons[key], report.power[key]
    if difference.low == difference.high == 0:
        return f"Hold: the scorer does exactly as well as {other}, no better; train on more instances or another loss."
    needed = power.groups_needed
    if difference.difference > 0 and needed is not None and needed <= MANY * power.groups:
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


def _low_room(report: Report) -> bool:
    best = max(row.estimate.mean for name, row in report.selectors.items() if name != "oracle")
    return report.selectors["oracle"].estimate.mean - best < NARROW


def _room(report: Report) -> str:
    best = max(row.estimate.mean for name, row in report.selectors.items() if name != "oracle")
    return percent(report.selectors["oracle"].estimate.mean - best)


def _better(report: Report, key: str) -> bool:
    return key in report.comparisons and report.comparisons[key].low > 0


def _worse(report: Report, key: str) -> bool:
    return key in report.comparisons and report.comparisons[key].high < 0


def _told(difference: Difference) -> str:
    interval = f"{percent(difference.low)} to {percent(difference.high)}"
    return f"{signed(difference.difference)} (95% interval {interval})"


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]
