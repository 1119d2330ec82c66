"""The findings: what the numbers of a data report say, in words."""

from collections.abc import Iterator

from cappy.annotation.report.numbers import count, label, number, part, share
from cappy.annotation.report.record import DataReport
from cappy.pages.words import metric_name
from cappy.records.instance import SELECTABLE


def findings(report: DataReport) -> tuple[str, ...]:
    """Sentences, the headline first; what a person should mend begins with "Caution"."""
    return (_headline(report), *_size(report), *_signal(report), *_variety(report), *_cautions(report))


def _headline(report: DataReport) -> str:
    total = report.total
    if not total.instances:
        return "There are no instances."
    if total.random is None or total.oracle is None:
        return "There is nothing to select from: no instance has an LLM's response or a choice."
    if report.tied_throughout:
        return "Selection cannot matter here: all responses of an instance have the same label."
    return (
        f"A random response is worth {label(total.random)} {metric_name(report.metric)} ×100, the best of its instance "
        f"{label(total.oracle)}: selection can gain up to {label(total.oracle - total.random)}."
    )


def _size(report: DataReport) -> Iterator[str]:
    total, groups = report.total, report.groups
    if total.instances:
        yield (
            f"{_some(total.instances, 'instance')} of {_some(groups.distinct, 'group')} in "
            f"{_some(len(report.splits), 'split')} and {_some(len(report.tasks), 'task')}, with "
            f"{_some(total.candidates, 'candidate')}, {count(total.selectable)} of them selectable."
        )


def _signal(report: DataReport) -> Iterator[str]:
    total = report.total
    if not total.pools:
        return
    pools = "instances" if total.pools == total.instances else "instances with a selectable response"
    if total.no_signal:
        silent = share(total.no_signal)
        yield f"{silent} of the {pools} carry no signal: all their selectable responses have equal labels."
    else:
        yield f"All {pools} carry a signal: their selectable responses have different labels."
    if total.comparable:
        yield (
            f"Two different responses of an instance have equal labels in {share(total.ties)} of the pairs; in "
            f"{share(total.best_shared)} of the instances several different responses share the best label."
        )


def _variety(report: DataReport) -> Iterator[str]:
    total = report.total
    if total.pools:
        yield (
            f"An instance has {number(total.selectable / total.pools)} selectable responses, "
            f"{number(total.distinct / total.pools)} of them different; they vary as much as "
            f"{number(total.effective)} equally frequent ones would."
        )


def _cautions(report: DataReport) -> Iterator[str]:
    total, instructions, groups = report.total, report.instructions, report.groups
    if total.pools and total.pools < total.instances:
        empty_handed = _of(total.instances - total.pools, total.instances, "instance", "has", "have")
        yield f"Caution: {empty_handed} no selectable response."
    if report.empty:
        yield f"Caution: {_of(report.empty, report.responses, 'response', 'is', 'are')} blank."
    for status, some in report.statuses.items():
        # What has the status empty is blank, and that has been said.
        if status not in ("ok", "empty"):
            responses = _of(some, sum(report.statuses.values()), "LLM response", "has", "have")
            verdict = "which a selector may pick" if status in SELECTABLE else "so that no selector may pick it"
            yield f"Caution: {responses} the status {status}, {verdict}."
    if instructions.in_several_splits:
        shared = _of(instructions.in_several_splits, instructions.distinct, "instruction", "stands", "stand")
        yield f"Caution: {shared} in more than one split: what is trained on one is tested on the other."
    if groups.in_several_splits:
        shared = _of(groups.in_several_splits, groups.distinct, "group", "stands", "stand")
        yield f"Caution: {shared} in more than one split: splits must go by group."
    remedy = "annotate with rougeL_unicode or chrf"
    if report.invisible_to_rouge_l and report.by_rouge_l:
        unseen = _of(report.invisible_to_rouge_l, total.instances, "instance", "has", "have")
        yield f"Caution: {unseen} no reference that Rouge-L can see, which is [a-z0-9] alone; {remedy}."
    if report.partly_invisible_to_rouge_l and report.by_rouge_l:
        partly = _of(report.partly_invisible_to_rouge_l, total.instances, "instance", "has", "have")
        yield f"Caution: {partly} a reference or response of which Rouge-L sees only a part; {remedy}."


def _of(some: int, of: int, noun: str, singular: str, plural: str) -> str:
    """Such as "1 of 20 responses (5.0%) is"."""
    return f"{count(some)} of {_some(of, noun)} ({part(some, of)}) {singular if some == 1 else plural}"


def _some(some: int, noun: str) -> str:
    return f"{count(some)} {noun if some == 1 else f'{noun}s'}"
