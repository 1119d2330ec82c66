"""The report: every number of an evaluation, as a record that goes to JSON and back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from cappy.errors import RecordError, shown
from cappy.pages.words import metric_name, percent, signed

SELECTORS: Mapping[str, str] = {
    "random": "random choice",
    "first": "first response",
    "shortest": "shortest",
    "longest": "longest",
    "best_system": "best single system",
    "likelihood_sum": "likelihood, sum",
    "likelihood_mean": "likelihood, mean per token",
    "mbr": "MBR",
    "champion": "champion",
    "scorer": "scorer",
    "hybrid_likelihood": "scorer + likelihood",
    "hybrid_mbr": "scorer + MBR",
    "oracle": "oracle",
}
"""Every selector and how a person reads its name, in the order of a report."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its 95% interval, on the metric's scale of 0 to 1."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A paired difference of two means, its 95% interval, and the probability that it is above 0."""

    difference: float
    low: float
    high: float
    probability: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One selector: its mean label, its gain over random choice, what was chosen for it on held-out instances.

    `ties` counts the instances where order alone decided between candidates with different labels.
    """

    estimate: Estimate
    gain: Difference
    ties: int = 0
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class TaskRow:
    """One task: the mean label of each selector, and the gain of the scorer (or of MBR without one) over random choice.

    `kind` is "choice" where every instance is a choice from a closed set; `templates` then has the accuracy of the same
    selector by template.
    """

    task: str
    kind: str
    instances: int
    means: Mapping[str, float]
    gain: Difference
    templates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Pick:
    """What a selector picked in an example, with its label."""

    selector: str
    response: str
    label: float


@dataclass(frozen=True, kw_only=True)
class Example:
    """An instance to look at: drawn at random, so that nobody chose it."""

    instance_id: str
    task: str
    instruction: str
    references: tuple[str, ...]
    picks: tuple[Pick, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that an evaluation found; numbers are on the metric's scale of 0 to 1.

    `comparisons` maps "one-other" to their paired difference; "scorer-likelihood" compares with the likelihood selector
    named in `better_likelihood`, the better one on the reported split itself, which favours the baseline. `averages`
    are unweighted means over tasks. `leaks` counts reported prompts that a scorer was trained on.
    """

    metric: str
    split: str
    seed: int
    resamples: int
    facts: Mapping[str, int]
    selectors: Mapping[str, Row]
    unavailable: Mapping[str, str]
    comparisons: Mapping[str, Difference]
    curve: Mapping[str, tuple[Estimate, ...]]
    tasks: tuple[TaskRow, ...] = ()
    averages: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    examples: tuple[Example, ...] = ()
    better_likelihood: str = ""
    leaks: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with the verdict in words beside the numbers."""
        from cappy.evaluation.verdict import verdict

        values: dict[str, Any] = TypeAdapter(Report).dump_python(self, mode="json")
        return {"verdict": list(verdict(self)), **values}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Report":
        """The report that `to_dict` wrote; RecordError if it is not one."""
        try:
            return TypeAdapter(Report).validate_python({key: values[key] for key in values if key != "verdict"})
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise RecordError(
                f"report: {place}: {first['msg']}, got {shown(first['input'])}; evaluate again"
            ) from error

    def table(self) -> list[tuple[str, str, str, str]]:
        """Rows for a terminal, the header first: selector, mean x 100, its interval, gain over random with interval."""
        rows = [("selector", f"{metric_name(self.metric)} x100", "95% interval", "to random")]
        for name, row in self.selectors.items():
            if name in ("first", "shortest") or (name.startswith("likelihood") and name != self.better_likelihood):
                continue
            gain = "" if name == "random" else f"{signed(row.gain.difference)} {spread(row.gain)}"
            label = f"{SELECTORS[name]} ({row.detail})" if row.detail else SELECTORS[name]
            rows.append((label, percent(row.estimate.mean), spread(row.estimate), gain))
        return rows

    def text(self) -> str:
        """The verdict and the table, as plain text."""
        from cappy.evaluation.verdict import verdict

        rows = self.table()
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            f"{row[0]:<{widths[0]}}  "
            + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
            for row in rows
        ]
        return "\n".join([*lines, "", *verdict(self)]) + "\n"


def spread(interval: Estimate | Difference) -> str:
    """The ends of an interval, x 100."""
    return f"{percent(interval.low)} to {percent(interval.high)}"
