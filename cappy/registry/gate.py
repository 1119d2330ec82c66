"""The rules of the gate: what a report must show before a version becomes the champion."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from cappy.errors import ConfigError, RecordError, quote
from cappy.evaluation import Difference
from cappy.evaluation.findings import LEVEL, MIN_GROUPS, ReportValues
from cappy.evaluation.verdict import first_version_rivals, poorer_callers, single_decodings
from cappy.selection.selectors import SELECTORS

Baseline = Literal["likelihood", "mbr"]
FIRST_TAIL = (1 - LEVEL) / 2
"""One-sided error of the first attempt on these test groups."""
LATER_TAIL = 0.0013
"""One-sided error of each later attempt on the same test groups: 2.5 % + 19 x 0.13 % is below 5 % in total."""
MAX_ATTEMPTS = 20
Check = tuple[bool, str]
"""Whether a check passed, and a sentence about it."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The decision of the gate and its reasons, as sentences."""

    decision: Literal["promote", "hold"]
    reasons: tuple[str, ...]


def decide(
    report: ReportValues,
    *,
    has_champion: bool,
    margin: float = 0.0,
    baseline: Baseline = "likelihood",
    guards: Mapping[str, float] | None = None,
    attempt: int = 1,
) -> Decision:
    """Applies the gate to a report: `comparisons` (paired differences, 0 to 1), `tasks`, `leaks`, `facts`.

    With a champion, the lower bound of the difference to it must be above `margin`, and the selector must not be shown
    to be worse than the greedy response (or the best single system). The first version must beat random
    choice, the better likelihood selector and the greedy response (or the best single system) if present, and also MBR
    if `baseline` is `mbr`. The bound is that of the 95% interval for the first `attempt` on these test groups, and
    that of the 99.74% interval for the next 19. For a guarded task, the lower bound of the difference to the champion
    (or to random choice) must be above minus its margin.

    The decision is always hold for a scorer trained on an instance of the report or on another one from the same row,
    for a report on the validation split or on fewer than 30 groups, and for differences without variance.

    Raises ConfigError if a guarded task is not in the report, and RecordError if the report does not have the format
    that evaluation writes.
    """
    comparisons = _comparisons(report)
    tail = FIRST_TAIL if attempt <= 1 else LATER_TAIL
    checks = [
        *_check_validity(report, attempt),
        *_check_gains(
            comparisons, has_champion, margin, baseline, tail, report.get("unavailable", {}).get("champion", "")
        ),
        *_check_guards(report, guards or {}, has_champion),
    ]
    reasons = [sentence for _, sentence in checks]
    if not has_champion:
        reasons += _unrequired_comparisons(comparisons, baseline)
    reasons += [f"For information: {sentence}" for sentence in poorer_callers(comparisons)]
    passed = all(passed for passed, _ in checks)
    return Decision(decision="promote" if passed else "hold", reasons=tuple(reasons))


def parse_guards(texts: Sequence[str]) -> dict[str, float]:
    """Parses TASK=MARGIN texts with margins from 0 to 1. Raises ConfigError for anything else."""
    guards = {}
    for text in texts:
        task, separator, number = text.rpartition("=")
        try:
            margin = float(number)
        except ValueError:
            margin = -1.0
        if not (task and separator and 0 <= margin <= 1):
            raise ConfigError(
                f"promotion: --guard: {quote(text)} is not a TASK=MARGIN with a margin of 0 to 1, such as rte=0.02"
            )
        guards[task] = margin
    return guards


def format_interval(comparison: Difference) -> str:
    """A difference and its 95% interval as text, both x 100."""
    difference, low, high = (
        f"{100 * value:+.1f}" for value in (comparison.difference, comparison.low, comparison.high)
    )
    return f"{difference} (95% interval {low} to {high}, x100)"


def _comparisons(report: ReportValues) -> dict[str, Difference]:
    values = report.get("comparisons")
    try:
        return TypeAdapter(dict[str, Difference]).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        field_path = ".".join(str(part) for part in ("comparisons", *first["loc"]))
        raise RecordError(
            f"report: {field_path}: {first['msg']}, got {quote(first['input'])}; evaluate again"
        ) from error


def _check_validity(report: ReportValues, attempt: int) -> Iterator[Check]:
    for name, count in report.get("leaks", {}).items():
        if count:
            problem = f"was trained on {count} of the reported instances, or on others from the same rows"
            yield False, f"The {name} {problem}: prepare splits without overlap."
    if report.get("split") == "validation":
        yield (
            False,
            "The report is on the validation split, which decides when training stops: evaluate on --split test.",
        )
    groups = report.get("facts", {}).get("groups")
    if not isinstance(groups, int) or groups < MIN_GROUPS:
        count = groups if isinstance(groups, int) else "an unknown number of"
        remedy = "prepare more test instances, or evaluate with --folds 5, which tests on all of them"
        yield False, f"The report is on {count} groups, at least {MIN_GROUPS} are needed for a decision: {remedy}."
    if attempt > MAX_ATTEMPTS:
        remedy = "prepare a new test split from instances that no version was tested on"
        yield False, f"This is attempt {attempt} on the same test groups, at most {MAX_ATTEMPTS} are allowed: {remedy}."


def _check_gains(
    comparisons: Mapping[str, Difference],
    has_champion: bool,
    margin: float,
    baseline: Baseline,
    tail: float,
    no_champion_reason: str,
) -> Iterator[Check]:
    if has_champion:
        if "selector-champion" not in comparisons and no_champion_reason:
            yield False, f"The report does not compare with the champion: {no_champion_reason}."
            return
        yield _check_gain(comparisons, "champion", "the champion", margin, tail)
        yield from _check_not_worse(comparisons)
        return
    for selector in first_version_rivals(comparisons, requested=baseline):
        yield _check_gain(comparisons, selector.key, selector.name_in_sentence, margin, tail)


def _check_not_worse(comparisons: Mapping[str, Difference]) -> Iterator[Check]:
    """Fails if the selector is shown to be worse than the response that a user would have without selection.

    Beating the champion is not enough: both may be worse than one greedy call on these instances.
    """
    for selector in single_decodings(comparisons)[-1:]:
        comparison = comparisons[f"selector-{selector.key}"]
        if comparison.high < 0:
            difference = format_interval(comparison)
            yield False, f"The selector does worse than {selector.name_in_sentence}: difference {difference}."


def _unrequired_comparisons(comparisons: Mapping[str, Difference], requested: str) -> Iterator[str]:
    """The differences to selectors that a first version must beat only on request."""
    for selector in SELECTORS.values():
        key = f"selector-{selector.key}"
        if selector.must_beat == "on_request" and selector.key != requested and key in comparisons:
            difference = format_interval(comparisons[key])
            yield f"For information: against {selector.name_in_sentence} the difference is {difference}."


def _check_gain(comparisons: Mapping[str, Difference], selector: str, name: str, margin: float, tail: float) -> Check:
    comparison = comparisons.get(f"selector-{selector}")
    if comparison is None:
        return False, f"The report has no comparison with {name}: evaluate again."
    if not comparison.standard_error:
        reason = "all differences are equal" if comparison.standard_error == 0 else "there is a single group"
        return False, f"The selector is not proven to beat {name}: {reason}, so there is no standard error."
    from cappy.evaluation.statistics import lower_bound

    passed = (comparison.low if tail == FIRST_TAIL else lower_bound(comparison, 1 - 2 * tail)) > margin
    verb = "beats" if passed else "is not proven to beat"
    threshold = f" by more than {100 * margin:.1f}" if margin else ""
    level = "" if tail == FIRST_TAIL else f", and a confidence of at least {100 * (1 - tail):.2f}% is required"
    needed = "" if passed else _describe_groups_needed(comparison, margin, tail)
    return passed, f"The selector {verb} {name}{threshold}: difference {format_interval(comparison)}{level}.{needed}"


def _describe_groups_needed(comparison: Difference, margin: float, tail: float) -> str:
    """A sentence with the number of groups that a gain of this size needs; empty if there is no gain."""
    from cappy.evaluation.statistics import compute_power

    gain = comparison.difference - margin
    if gain <= 0:
        return ""
    excess = replace(comparison, difference=gain)
    needed = max(compute_power(excess, 1 - 2 * tail).groups_needed or 0, comparison.groups + 1)
    above = " above the margin" if margin else ""
    chance = "to be detected in four of five cases"
    current = f"the report has {comparison.groups:,}"
    return f" A gain of {100 * gain:.1f}{above} needs about {needed:,} groups {chance}, {current}."


def _check_guards(report: ReportValues, guards: Mapping[str, float], has_champion: bool) -> Iterator[Check]:
    tasks = {task["task"]: task for task in report.get("tasks", ())}
    for name, margin in guards.items():
        if name not in tasks:
            task_names = quote(", ".join(sorted(tasks)), 200)
            raise ConfigError(f"guard: the report has no task {quote(name)}; its tasks: {task_names}")
        champion = tasks[name].get("against_champion") if has_champion else None
        values, reference = (champion, "the champion") if champion else (tasks[name]["gain"], "random choice")
        comparison = TypeAdapter(Difference).validate_python(values)
        passed = comparison.low > -margin
        verb = "is not worse" if passed else "may be worse"
        difference = format_interval(comparison)
        yield (
            passed,
            f"On {name} the selector {verb} than {reference} by {100 * margin:.1f} or more: difference {difference}.",
        )
