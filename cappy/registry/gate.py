"""The gate's rule: what a report must prove before the champion's alias may move."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cappy.errors import ConfigError, shown

Baseline = Literal["likelihood", "mbr"]
BASELINES: Mapping[Baseline, str] = {"likelihood": "the better likelihood selector", "mbr": "MBR"}
Check = tuple[bool, str]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the gate says, and why, in sentences."""

    decision: Literal["promote", "hold"]
    reasons: tuple[str, ...]


def decide(
    report: Mapping[str, Any],
    *,
    has_champion: bool,
    margin: float = 0.0,
    baseline: Baseline = "likelihood",
    guards: Mapping[str, float] | None = None,
) -> Decision:
    """The gate's rule on a report's `comparisons` (paired differences with 95% intervals, 0..1), `tasks` and `leaks`.

    With a champion the lower bound of the difference to it must be above `margin`; the first version must beat random
    choice, the better likelihood selector where there is one, and MBR too where `baseline` is `mbr`. A guarded task may
    fall by less than its margin: the lower bound of its difference to the champion (to random choice without one) must
    be above minus that margin. A scorer trained on a reported prompt is held, and so is one whose report was
    cross-fitted, which is about the recipe. ConfigError where a guarded task is not in the report.
    """
    checks = [
        *_valid(report),
        *_proof(report, has_champion, margin, baseline),
        *_guarded(report, guards or {}, has_champion),
    ]
    reasons = [sentence for _, sentence in checks]
    comparisons = report.get("comparisons", {})
    if not has_champion and baseline != "mbr" and "scorer-mbr" in comparisons:
        reasons.append(f"For information: against MBR the difference is {interval(comparisons['scorer-mbr'])}.")
    passed = all(passed for passed, _ in checks)
    return Decision(decision="promote" if passed else "hold", reasons=tuple(reasons))


def parse_guards(texts: Sequence[str]) -> dict[str, float]:
    """TASK=MARGIN as a person writes it, margins of 0 to 1; ConfigError for anything else."""
    guards = {}
    for text in texts:
        task, separator, number = text.rpartition("=")
        try:
            margin = float(number)
        except ValueError:
            margin = -1.0
        if not (task and separator and 0 <= margin <= 1):
            raise ConfigError(f"guard: {shown(text)} is no TASK=MARGIN with a margin of 0 to 1, such as rte=0.02")
        guards[task] = margin
    return guards


def interval(found: Mapping[str, float]) -> str:
    """A difference with its interval, x 100."""
    difference, low, high = (f"{100 * found[key]:+.1f}" for key in ("difference", "low", "high"))
    return f"{difference} (95% interval {low} to {high}, x100)"


def _valid(report: Mapping[str, Any]) -> Iterator[Check]:
    for name, count in report.get("leaks", {}).items():
        if count:
            yield (
                False,
                f"The {name} was trained on {count} of the reported prompts: prepare splits that share none.",
            )
    if report.get("folds"):
        yield False, "The report is cross-fitted, so it is about the recipe: evaluate this scorer on its test split."


def _proof(report: Mapping[str, Any], has_champion: bool, margin: float, baseline: Baseline) -> Iterator[Check]:
    comparisons = report.get("comparisons", {})
    if has_champion:
        yield _beats(comparisons, "champion", "the champion", margin)
        return
    yield _beats(comparisons, "random", "random choice", margin)
    for name, words in BASELINES.items():
        # A pool without likelihoods has no such selector to beat; one that was asked for must be there.
        if name == baseline == "mbr" or (name == "likelihood" and "scorer-likelihood" in comparisons):
            yield _beats(comparisons, name, words, margin)


def _beats(comparisons: Mapping[str, Any], other: str, words: str, margin: float) -> Check:
    found = comparisons.get(f"scorer-{other}")
    if found is None:
        return False, f"The report has no comparison with {words}: evaluate again."
    passed = found["low"] > margin
    verb = "beats" if passed else "is not proven to beat"
    bar = f" by more than {100 * margin:.1f}" if margin else ""
    return passed, f"The scorer {verb} {words}{bar}: difference {interval(found)}."


def _guarded(report: Mapping[str, Any], guards: Mapping[str, float], has_champion: bool) -> Iterator[Check]:
    tasks = {task["task"]: task for task in report.get("tasks", ())}
    for name, margin in guards.items():
        if name not in tasks:
            known = shown(", ".join(sorted(tasks)), 200)
            raise ConfigError(f"guard: the report has no task {shown(name)}; its tasks: {known}")
        champion = tasks[name].get("against_champion") if has_champion else None
        found, other = (champion, "the champion") if champion else (tasks[name]["gain"], "random choice")
        passed = found["low"] > -margin
        verb = "does not fall" if passed else "may fall"
        yield passed, f"On {name} the scorer {verb} by {100 * margin:.1f} to {other}: difference {interval(found)}."
