"""The verdict and the advice of a report, as text."""

from collections.abc import Collection, Iterator, Mapping

from cappy.evaluation.findings import MIN_GROUPS, Difference, Findings, format_interval
from cappy.pages import format_signed, percent
from cappy.selection.selectors import NOT_GIVEN, SELECTORS, SelectorSpec, title

SIGNIFICANCE_LEVEL = 0.05
"""Maximum adjusted p-value of a significant comparison."""
MIN_HEADROOM = 0.01
"""Difference between the oracle and the best selector below which a better scorer can gain less than a point."""
MIN_SPREAD = 0.01
"""Spread of an instance's scores, 0 to 1, below which a scorer hardly distinguishes its responses."""
_RIVALS = {selector.key: selector for selector in SELECTORS.values() if "verdict" in selector.shown_in}
"""The selectors that a verdict compares with, by their key in comparisons."""


def verdict(report: Findings) -> tuple[str, ...]:
    """The sentences of the verdict, headline first; a difference counts only if its 95% interval excludes 0."""
    subject = "selector" if "selector" in report.selectors else "mbr"
    if subject not in report.selectors:
        return ("Neither a scorer nor MBR could be evaluated.", *_cautions(report))
    differences = {
        name: report.comparisons[key] for name in _RIVALS if (key := f"{subject}-{name}") in report.comparisons
    }
    sentences = tuple(
        _comparison_sentence(report, subject, name, difference) for name, difference in differences.items()
    )
    more = (*_adaptation_sentence(report), *_score_sentence(report), *_cautions(report))
    return (_headline(subject, differences), *sentences, *more)


def outcome(difference: Difference) -> str:
    """'better', 'worse', or 'open' if the interval contains 0."""
    if difference.low > 0:
        return "better"
    return "worse" if difference.high < 0 else "open"


def _headline(subject: str, differences: dict[str, Difference]) -> str:
    parts = []
    for result, verb in (("better", "beats"), ("open", "is not shown to beat"), ("worse", "does not beat")):
        names = [
            _short_name(_RIVALS[name]) for name, difference in differences.items() if outcome(difference) == result
        ]
        if names:
            parts.append(f"{verb} {_join_names(names, 'and' if result == 'better' else 'or')}")
    return (
        f"{_subject_name(subject)} {'; it '.join(parts)}."
        if parts
        else f"{_subject_name(subject)} was not compared with any other selector."
    )


def _comparison_sentence(report: Findings, subject: str, name: str, difference: Difference) -> str:
    selector = _RIVALS[name]
    rival = report.better_likelihood_selector if selector.variant_of else name
    means = report.selectors[subject].estimate.mean, report.selectors[rival].estimate.mean
    numbers = f"{percent(means[0])} against {percent(means[1])}, {format_signed(difference.difference)}"
    interval = f"95% interval {format_interval(difference)}"
    verb = {"better": "beats", "worse": "does worse than", "open": "may or may not beat"}[outcome(difference)]
    remedy = _remedy(report, f"{subject}-{name}") if outcome(difference) == "open" else ""
    if difference.low == difference.high == 0:
        verb, remedy = "does exactly as well as", ""
    phrase = (
        f"{selector.name_in_sentence} ({title(rival)})"
        if selector.variant_of
        else f"{selector.name_in_sentence}{selector.remark}"
    )
    return f"{_subject_name(subject)} {verb} {phrase}: {numbers} ({interval}){remedy}."


def _remedy(report: Findings, key: str) -> str:
    """How many groups would decide an open difference, as text."""
    power = report.power.get(key)
    if power is None or power.groups_needed is None:
        return "; more instances are needed to decide this"
    detectable = f"with {power.groups:,} groups, differences of {percent(power.smallest)} or more are detectable"
    if not power.within_reach:
        return f"; {detectable}, and this one is far smaller"
    return f"; {detectable}; this one would need about {power.groups_needed:,} groups"


def _adaptation_sentence(report: Findings) -> Iterator[str]:
    """What training added to the score of the scorer that it started from, or why that is not known."""
    difference = report.comparisons.get("scorer-initial")
    if difference is not None:
        means = [percent(report.selectors[name].estimate.mean) for name in ("scorer", "initial")]
        gain = f"{means[0]} after adaptation, {means[1]} before, {format_signed(difference.difference)}"
        verb = {"better": "improved", "worse": "worsened", "open": "is not shown to have improved"}[outcome(difference)]
        if difference.low == difference.high == 0:
            verb = "did not change"
        yield f"Adaptation {verb} the scorer's picks: {gain} (95% interval {format_interval(difference)})."
    elif (reason := report.unavailable.get("initial", NOT_GIVEN)) != NOT_GIVEN:
        yield f"The scorer before adaptation is not shown: {reason}."


def _score_sentence(report: Findings) -> Iterator[str]:
    """What the fitted weights add to the score; nothing if the selector picks by the score alone."""
    difference = report.comparisons.get("selector-scorer")
    if difference is None or report.selectors["selector"].detail == "score":
        return
    verb = {"better": "beats", "worse": "does worse than", "open": "is not shown to beat"}[outcome(difference)]
    mean, detail = report.selectors["scorer"].estimate.mean, report.selectors["selector"].detail
    yield (
        f"The selector ({detail}) {verb} the scorer's score alone: {percent(mean)} for the score, "
        f"{format_signed(difference.difference)} for the selector (95% interval {format_interval(difference)})."
    )


def _cautions(report: Findings) -> Iterator[str]:
    instances = int(report.facts["instances"])
    if report.folds:
        yield (
            f"Cross-fitted over {report.folds} folds: the results are those of the recipe, trained on the other folds; "
            "the evaluated scorer itself was trained on more instances."
        )
    for name, count in report.leaks.items():
        if count:
            yield (
                f"Caution: the {name} was trained on {count} of the {instances} {report.split} instances, "
                "or on others from the same rows, so its result is overestimated."
            )
    for sentence in poorer_callers(report.comparisons):
        yield f"Caution: {sentence}"
    yield from _holm_caution(report)
    if (groups := int(report.facts["groups"])) < MIN_GROUPS:
        yield f"Caution: {groups} groups are too few for a reliable result; the gate needs at least {MIN_GROUPS}."


def _holm_caution(report: Findings) -> Iterator[str]:
    """Names the comparisons that are significant alone but not after Holm's correction."""
    comparisons = report.comparisons
    corrected = [
        " against ".join(map(title, key.split("-")))
        for key, value in comparisons.items()
        if outcome(value) != "open" and report.adjusted.get(key, 0) > SIGNIFICANCE_LEVEL
    ]
    if corrected:
        yield (f"Not significant after Holm correction over {len(comparisons)} comparisons: {', '.join(corrected)}.")


def _subject_name(name: str) -> str:
    return "The selector" if name == "selector" else "No scorer was given; MBR"


def _join_names(names: list[str], word: str) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"


def _short_name(selector: SelectorSpec) -> str:
    return f"the {selector.variant_of}" if selector.variant_of else selector.name_in_sentence


def advice(report: Findings) -> str:
    """One sentence of advice: about leaks, else about what is proven, else about what would prove it.

    It begins with "Promote" only if the gate with its default options would let the selector pass.
    """
    text = _choose_advice(report)
    if not text.startswith("Promote"):
        return text
    if report.split == "validation":
        return (
            "Hold: training was stopped early on the validation split, so it proves nothing; evaluate on --split test."
        )
    if report.facts["groups"] < MIN_GROUPS:
        return (
            f"Hold: {report.facts['groups']} groups are too few, the gate needs {MIN_GROUPS}; prepare more test "
            "instances, or evaluate with --folds 5, which tests on all instances."
        )
    return text


def first_version_rivals(comparisons: Collection[str], requested: str = "") -> list[SelectorSpec]:
    """The selectors that a first version must be shown to beat, by the comparisons of its report.

    `requested` is the key of a selector that is required only on request. Only one selector that uses a single
    decoding is required: the greedy response or, if the report has no comparison with it, the best single system (the
    order of `SELECTORS` decides).
    """
    required = {
        selector.key: selector
        for selector in SELECTORS.values()
        if selector.must_beat == "always"
        or (selector.must_beat == "where_compared" and f"selector-{selector.key}" in comparisons)
        or (selector.must_beat == "on_request" and selector.key == requested)
    }
    return [*required.values(), *single_decodings(comparisons)[-1:]]


def single_decodings(comparisons: Collection[str]) -> list[SelectorSpec]:
    """The selectors of a single decoding that the selector is compared with; the greedy response is the last one."""
    return [each for each in SELECTORS.values() if each.single_decoding and f"selector-{each.key}" in comparisons]


def poorer_callers(comparisons: Mapping[str, Difference]) -> Iterator[str]:
    """A sentence for each kind of caller who knows too little for the selector to be as good as one greedy response."""
    for selector in SELECTORS.values():
        difference = comparisons.get(f"{selector.name}-greedy")
        if "greedy" in selector.against and difference is not None and difference.high < 0:
            loss = _format_gain(difference)
            yield f"for callers who know less ({selector.title}) the picks are worse than the greedy response: {loss}."


def _choose_advice(report: Findings) -> str:
    if leaked := [name for name, count in report.leaks.items() if count]:
        names = " and the ".join(leaked)
        return f"Hold: the {names} saw reported instances in training; prepare disjoint splits, then train again."
    if "selector" not in report.selectors:
        return _advise_without_scorer(report)
    if "champion" in report.selectors:
        return _advise_against_champion(report)
    if reason := _why_no_champion(report):
        return f"Hold: the report does not compare with the champion: {reason}."
    if _is_worse(report, "selector-greedy") and not _mbr_leads(report):
        return _advise_greedy(report)
    if _is_worse(report, "scorer-initial"):
        loss = _format_gain(report.comparisons["scorer-initial"])
        return f"Hold: adaptation worsened the scorer's picks by {loss}; train on more instances, or keep the scorer."
    for selector in first_version_rivals(report.comparisons):
        key = f"selector-{selector.key}"
        if key in report.comparisons and not _is_better(report, key):
            return _advise_below_rival(report, key, selector.name_in_sentence)
    return _advise_against_mbr(report)


def _why_no_champion(report: Findings) -> str:
    """Why the report lacks the champion that it was to be compared with; empty if there was none."""
    reason = report.unavailable.get("champion", "")
    return "" if reason == NOT_GIVEN else reason


def _advise_greedy(report: Findings) -> str:
    """Advice if one greedy call without selection does better than the selector."""
    difference = report.comparisons["selector-greedy"]
    text = f"Use one greedy response: the selector's pick of several is worse by {_format_gain(difference)}"
    return f"{text}; {_scorer_remedy(report)} before you sample more than one."


def _advise_without_scorer(report: Findings) -> str:
    if "mbr" in report.selectors and _is_better(report, "mbr-random"):
        gain = format_signed(report.comparisons["mbr-random"].difference)
        return f"Use MBR for now: it is {gain} above random choice without training; then train a scorer to beat it."
    return "Train a scorer (cappy finetuning): no selector without a scorer is shown to beat random choice."


def _advise_against_champion(report: Findings) -> str:
    for selector in single_decodings(report.comparisons)[-1:]:
        if _is_worse(report, f"selector-{selector.key}"):
            loss = _format_gain(report.comparisons[f"selector-{selector.key}"])
            return (
                f"Hold: the selector does worse than {selector.name_in_sentence} by {loss}; {_scorer_remedy(report)}."
            )
    difference = report.comparisons["selector-champion"]
    if _is_better(report, "selector-champion"):
        return f"Promote: the selector beats the champion by {_format_gain(difference)}."
    if difference.high < 0:
        return f"Hold: the selector does worse than the champion by {_format_gain(difference)}."
    return _advise_unproven(report, "selector-champion", "the champion")


def _advise_below_rival(report: Findings, key: str, other: str) -> str:
    """Advice if a first version is not shown to beat a selector that the gate requires it to beat."""
    if _mbr_leads(report) and not _is_better(report, "selector-mbr"):
        gain = _format_gain(report.comparisons["mbr-random"])
        failure = f"the selector {'does worse than' if _is_worse(report, key) else 'is not shown to beat'} {other}"
        return f"Use MBR: it beats random choice by {gain} without training, and {failure}; {_scorer_remedy(report)}."
    if _is_flat(report):
        alternative = ", or use MBR" if "mbr" in report.selectors else ""
        return f"Hold: the selector is not shown to beat {other}; {_scorer_remedy(report)}{alternative}."
    if key == "selector-random" and _is_worse(report, key):
        return "Hold: the selector does worse than random choice; check the worst instances and the labels first."
    if _is_worse(report, key):
        loss = _format_gain(report.comparisons[key])
        return f"Hold: the selector does worse than {other} by {loss}; {_scorer_remedy(report)}."
    return _advise_unproven(report, key, other)


def _mbr_leads(report: Findings) -> bool:
    """Whether MBR is shown to beat random choice and is the best selector that needs no training."""
    others = {"greedy", report.better_likelihood_selector} & {*report.selectors}
    if not _is_better(report, "mbr-random"):
        return False
    best = max((report.selectors[name].estimate.mean for name in others), default=0.0)
    return report.selectors["mbr"].estimate.mean >= best


def _scorer_remedy(report: Findings) -> str:
    """How to improve the scorer."""
    if not _is_flat(report):
        return "train on more instances"
    spread = report.calibration.spread if report.calibration is not None else None
    return (
        "the scorer hardly distinguishes the responses of an instance (median difference of their scores: "
        f"{100 * (spread or 0.0):.2g} of 100), which more data of this kind rarely improves: train from a larger "
        "encoder"
    )


def _is_flat(report: Findings) -> bool:
    """Whether the scorer gives all responses of an instance about the same score."""
    calibration = report.calibration
    return calibration is not None and calibration.spread is not None and calibration.spread < MIN_SPREAD


def _advise_against_mbr(report: Findings) -> str:
    """Advice if the gate would let the selector pass."""
    mbr_difference = report.comparisons.get("selector-mbr")
    may_not_beat_mbr = mbr_difference is not None and mbr_difference.low <= 0
    if mbr_difference is not None and mbr_difference.high < 0:
        loss = _format_gain(mbr_difference)
        return f"Use MBR: the selector does worse by {loss}; {_scorer_remedy(report)} before you promote."
    if may_not_beat_mbr:
        return f"Promote if you cannot use MBR; {_lowercase_first(_advise_unproven(report, 'selector-mbr', 'MBR'))}"
    if all(task.kind == "choice" for task in report.tasks):
        return "Promote: the selector beats random choice and the selectors that need no training on these choices."
    if _headroom(report) < MIN_HEADROOM:
        headroom = percent(_headroom(report))
        return f"Promote, and sample other candidates: the oracle is only {headroom} above the best selector."
    if _is_curve_rising(report):
        last, gain = len(report.curve["selector"]), percent(_last_gain(report))
        return f"Promote, and sample more: candidate {last} still adds {gain}."
    return "Promote: the selector beats random choice, and the likelihood and MBR if they are available."


def _advise_unproven(report: Findings, key: str, other: str) -> str:
    """Advice on an open difference: more data only if a feasible number of groups would show it."""
    difference, power = report.comparisons[key], report.power[key]
    if difference.low == difference.high == 0:
        return f"Hold: the selector does exactly as well as {other}; train on more instances or with another loss."
    if _is_flat(report):
        return f"Hold: the selector is not shown to beat {other}, {_format_gain(difference)}; {_scorer_remedy(report)}."
    needed = power.groups_needed
    if difference.difference > 0 and needed is not None and power.within_reach:
        return (
            f"More data: {format_signed(difference.difference)} against {other} is not proven on {power.groups} "
            f"groups; about {max(needed, power.groups + 1, MIN_GROUPS):,} would show it."
        )
    return (
        f"Hold: the selector is not shown to beat {other}, {_format_gain(difference)}, and {power.groups} groups "
        f"cannot show a difference below {percent(power.smallest)}; train on more instances or with another loss."
    )


def _is_curve_rising(report: Findings) -> bool:
    return report.num_worthwhile_candidates == len(report.curve["selector"]) > 1


def _last_gain(report: Findings) -> float:
    return report.curve["selector"][-1].mean - report.curve["selector"][-2].mean


def _headroom(report: Findings) -> float:
    """Difference between the oracle and the best other selector, 0 to 1."""
    best = max(row.estimate.mean for name, row in report.selectors.items() if name != "oracle")
    return report.selectors["oracle"].estimate.mean - best


def _is_better(report: Findings, key: str) -> bool:
    """Whether the first selector is shown to be better; a difference without variance proves nothing."""
    difference = report.comparisons.get(key)
    return difference is not None and difference.low > 0 and bool(difference.standard_error)


def _is_worse(report: Findings, key: str) -> bool:
    return key in report.comparisons and report.comparisons[key].high < 0


def _format_gain(difference: Difference) -> str:
    return f"{format_signed(difference.difference)} (95% interval {format_interval(difference)})"


def _lowercase_first(text: str) -> str:
    return text[0].lower() + text[1:]
