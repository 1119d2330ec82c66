"""The tables of a report: selectors, comparisons, tasks and their averages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cappy.evaluation import selectors, statistics
from cappy.evaluation.findings import Average, Difference, Estimate, Row, TaskRow
from cappy.evaluation.pools import Pool, Vector
from cappy.evaluation.rules import Rules

COMPARISONS = (
    *(
        ("scorer", other)
        for other in ("random", "first", "longest", "best_system", "greedy", "likelihood", "mbr", "champion")
    ),
    ("hybrid_mbr", "mbr"),
    ("hybrid_mbr", "scorer"),
    ("hybrid_likelihood", "scorer"),
    ("mbr", "random"),
    ("mbr", "likelihood"),
)


@dataclass(frozen=True, kw_only=True)
class Means:
    """The label of every selector's pick by pool, and the group of every pool."""

    labels: Mapping[str, Vector]
    groups: Sequence[str]

    def compare(self, one: str, other: str) -> Difference:
        """The paired difference of two selectors."""
        return statistics.compare(self.labels[one], self.labels[other], self.groups)

    def estimates(self) -> dict[str, Estimate]:
        """Selector -> its mean label with its interval."""
        stacked = np.stack(list(self.labels.values()), axis=1)
        return dict(zip(self.labels, statistics.estimates(stacked, self.groups), strict=True))


def rows(found: Means, rules: Rules, pools: Sequence[Pool]) -> dict[str, Row]:
    """One row per selector."""

    def ties(name: str) -> int:
        values = rules.values.get(name, ())
        return sum(selectors.is_tied(value, pool.labels) for pool, value in zip(pools, values, strict=False))

    return {
        name: Row(
            estimate=estimate,
            gain=found.compare(name, "random"),
            ties=ties(name),
            detail=rules.details.get(name, ""),
        )
        for name, estimate in found.estimates().items()
    }


def pairs(found: Means, likelihood: str) -> dict[str, tuple[str, str]]:
    """The pairs that a report compares, by key; `likelihood` is the selector that the word stands for."""
    named = {name: likelihood if name == "likelihood" else name for _, name in COMPARISONS}
    return {
        f"{one}-{other}": (one, named[other])
        for one, other in COMPARISONS
        if one in found.labels and named[other] in found.labels
    }


def tasks(pools: Sequence[Pool], found: Means) -> tuple[TaskRow, ...]:
    """One row per task, in alphabetical order."""
    subject = subject_of(found.labels)
    table = []
    for task, where in grouped([pool.instance.task for pool in pools]).items():
        own = [pools[index] for index in where]
        labels = {name: values[where] for name, values in found.labels.items()}
        part = Means(labels=labels, groups=[pool.instance.group_id for pool in own])
        is_choice = all(pool.is_choice for pool in own)
        templates = grouped([pool.instance.template for pool in own]) if is_choice else {}
        table.append(
            TaskRow(
                task=task,
                kind="choice" if is_choice else "generation",
                instances=len(own),
                means={name: float(values.mean()) for name, values in labels.items()},
                gain=part.compare(subject, "random"),
                templates={name: float(labels[subject][index].mean()) for name, index in templates.items()},
                against_champion=part.compare("scorer", "champion") if {"scorer", "champion"} <= {*labels} else None,
            )
        )
    return tuple(table)


def averages(table: Sequence[TaskRow]) -> dict[str, Average]:
    """Unweighted means over tasks; CrowS-Pairs can carry an average alone, so there is one without it.

    Intervals are over tasks: they say what other tasks of the kind would give.
    """
    kept = [row for row in table if "crows" not in row.task.casefold()]
    sets = {"all tasks": table, "without CrowS-Pairs": kept if len(kept) < len(table) else ()}
    return {title: _average(own) for title, own in sets.items() if len(own) > 1}


def _average(table: Sequence[TaskRow]) -> Average:
    labels = {name: np.array([row.means[name] for row in table]) for name in table[0].means}
    found = Means(labels=labels, groups=[row.task for row in table])
    return Average(tasks=len(table), means=found.estimates(), gain=found.compare(subject_of(labels), "random"))


def subject_of(labels: Mapping[str, Vector]) -> str:
    """The selector that a report is about: the scorer, MBR without one, and the first response without either."""
    return next(name for name in ("scorer", "mbr", "first") if name in labels)


def grouped(names: Sequence[str]) -> dict[str, list[int]]:
    """Name -> where it stands, names in alphabetical order."""
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        groups.setdefault(name, []).append(index)
    return dict(sorted(groups.items()))
