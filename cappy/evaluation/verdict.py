"""The verdict: what the numbers of a report say, in words."""

from collections.abc import Iterator

from cappy.evaluation.findings import MIN_GROUPS, Difference
from cappy.evaluation.report import SELECTORS, Report, sides, spread
from cappy.pages.words import percent, signed

BASELINES = {
    "random": "random choice",
    "greedy": "the greedy response, which needs no samples",
    "likelihood": "the better likelihood selector",
    "mbr": "MBR, the consensus of the pool, which needs no training",
    "champion": "the champion",
}
SURE = 0.05
"""The adjusted p-value up to which a comparison stands among all."""
_SHORT = {
    "random": "random choice",
    "greedy": "the greedy response",
    "likelihood": "the likelihood",
    "mbr": "MBR",
    "champion": "the champion",
}


def verdict(report: Report) -> tuple[str, ...]:
    """Sentences, the headline first; a difference counts only if its 95% interval leaves out 0."""
    subject = "scorer" if "scorer" in report.selectors else "mbr"
    if subject not in report.selectors:
        return ("Neither a scorer nor MBR could be evaluated.", *_cautions(report))
    found = {name: report.comparisons[key] for name in BASELINES if (key := f"{subject}-{name}") in report.comparisons}
    said = tuple(_sentence(report, subject, name, difference) for name, difference in found.items())
    return (_headline(subject, found), *said, *_hybrid(report), *_cautions(report))


def outcome(difference: Difference) -> str:
    """'better', 'worse', or 'open' where the interval holds 0."""
    if difference.low > 0:
        return "better"
    return "worse" if difference.high < 0 else "open"


def _headline(subject: str, found: dict[str, Difference]) -> str:
    parts = []
    for result, verb in (("better", "beats"), ("open", "is not shown to beat"), ("worse", "does not beat")):
        names = [_SHORT[name] for name, difference in found.items() if outcome(difference) == result]
        if names:
            parts.append(f"{verb} {_listed(names, 'and' if result == 'better' else 'or')}")
    return f"{_subject(subject)} {'; it '.join(parts)}." if parts else f"{_subject(subject)} was compared with nothing."


def _sentence(report: Report, subject: str, name: str, difference: Difference) -> str:
    other = report.better_likelihood if name == "likelihood" else name
    means = report.selectors[subject].estimate.mean, report.selectors[other].estimate.mean
    numbers = f"{percent(means[0])} against {percent(means[1])}, {signed(difference.difference)}"
    interval = f"95% interval {spread(difference)}"
    verb = {"better": "beats", "worse": "does worse than", "open": "may or may not beat"}[outcome(difference)]
    remedy = _remedy(report, f"{subject}-{name}") if outcome(difference) == "open" else ""
    if difference.low == difference.high == 0:
        verb, remedy = "does exactly as well as", ""
    who = f"{BASELINES[name]} ({SELECTORS[other]})" if name == "likelihood" else BASELINES[name]
    return f"{_subject(subject)} {verb} {who}: {numbers} ({interval}){remedy}."


def _remedy(report: Report, key: str) -> str:
    """What more instances would tell of a difference that is open."""
    power = report.power.get(key)
    if power is None or power.groups_needed is None:
        return "; more instances would tell"
    smallest = percent(power.smallest)
    if not power.within_reach:
        return f"; {power.groups:,} groups show {smallest} or more, and this one is far below"
    return f"; {power.groups:,} groups show {smallest} or more, about {power.groups_needed:,} would show this one"


def _hybrid(report: Report) -> Iterator[str]:
    difference = report.comparisons.get("hybrid_mbr-mbr")
    if difference is None:
        return
    verb = {"better": "beat", "worse": "do worse than", "open": "are not shown to beat"}[outcome(difference)]
    mean = report.selectors["hybrid_mbr"].estimate.mean
    yield (
        f"The scorer and MBR together {verb} MBR: {percent(mean)}, {signed(difference.difference)} "
        f"(95% interval {spread(difference)})."
    )


def _cautions(report: Report) -> Iterator[str]:
    instances = int(report.facts["instances"])
    if report.folds:
        yield (
            f"Cross-fitted over {report.folds} folds: this is what the recipe is worth, trained on the other folds; "
            "the scorer that it made was trained on more."
        )
    for name, count in report.leaks.items():
        if count:
            yield (
                f"Caution: the {name} was trained on {count} of the {instances} {report.split} instances "
                "or their rows, so its result is too good."
            )
    yield from _among_all(report)
    if (groups := int(report.facts["groups"])) < MIN_GROUPS:
        yield f"Caution: only {groups} groups, too few to rely on; the gate holds on fewer than {MIN_GROUPS}."


def _among_all(report: Report) -> Iterator[str]:
    """What Holm's correction opens again."""
    found = report.comparisons
    opened = [
        " against ".join(sides(key))
        for key, value in found.items()
        if outcome(value) != "open" and report.adjusted.get(key, 0) > SURE
    ]
    if opened:
        yield (f"Not significant after Holm correction over {len(found)} comparisons: {', '.join(opened)}.")


def _subject(name: str) -> str:
    return "The scorer" if name == "scorer" else "No scorer was given; MBR"


def _listed(names: list[str], word: str) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"
