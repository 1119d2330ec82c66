"""The report: every number of an evaluation, as a record that goes to JSON and back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from cappy.errors import RecordError, shown
from cappy.evaluation.findings import (
    Average,
    Calibrated,
    Cost,
    Coverage,
    Difference,
    Estimate,
    Example,
    Power,
    Probe,
    Published,
    Row,
    TaskRow,
)
from cappy.pages.words import metric_name, percent, signed

SCHEMA = 3
"""Goes up when a field changes its meaning or goes; a field that is added needs no other number."""

SELECTORS: Mapping[str, str] = {
    "random": "random choice",
    "first": "first response",
    "shortest": "shortest",
    "longest": "longest",
    "best_system": "best single system",
    "greedy": "greedy response",
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
class Report:
    """Everything that an evaluation found; numbers are on the metric's scale of 0 to 1.

    `comparisons` maps "one-other" to their paired difference; "scorer-likelihood" compares with the likelihood selector
    named in `better_likelihood`, the better one on the reported split itself, which favours the baseline. `adjusted`
    has the comparisons' p-values after Holm's correction. `averages` are unweighted means over tasks. `leaks` counts
    reported instances that a scorer was trained on or stopped by, or other templates of whose rows it was. `pays_until`
    is the number of candidates beyond which one more adds less than `curve.WORTH`; 0 where no scorer was given. `folds`
    is above 0 where the report was cross-fitted: it is then about the recipe, not about the scorer in `versions`.
    `tested_groups` is a sketch of the reported groups (`cappy.evaluation.overlap`), by which the gate counts how often
    they were used.
    """

    metric: str
    split: str
    seed: int
    facts: Mapping[str, int]
    selectors: Mapping[str, Row]
    unavailable: Mapping[str, str]
    comparisons: Mapping[str, Difference]
    curve: Mapping[str, tuple[Estimate, ...]]
    adjusted: Mapping[str, float] = field(default_factory=dict)
    power: Mapping[str, Power] = field(default_factory=dict)
    tasks: tuple[TaskRow, ...] = ()
    averages: Mapping[str, Average] = field(default_factory=dict)
    examples: tuple[Example, ...] = ()
    worst: tuple[Example, ...] = ()
    calibration: Calibrated | None = None
    coverage: Coverage | None = None
    probes: tuple[Probe, ...] = ()
    published: tuple[Published, ...] = ()
    cost: Cost = field(default_factory=Cost)
    pays_until: int = 0
    better_likelihood: str = ""
    leaks: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    folds: int = 0
    tested_groups: str = ""
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with the verdict and the advice in words beside the numbers."""
        from cappy.evaluation.advice import advice
        from cappy.evaluation.verdict import verdict

        values: dict[str, Any] = TypeAdapter(Report).dump_python(self, mode="json")
        return {"verdict": list(verdict(self)), "next": advice(self), **values}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Report":
        """The report that `to_dict` wrote; RecordError if it is not one, or has another schema."""
        check_schema(values)
        told = {key: value for key, value in values.items() if key not in ("verdict", "next")}
        try:
            return TypeAdapter(Report).validate_python(told)
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
        """The table, the verdict and the advice, as plain text."""
        from cappy.evaluation.advice import advice
        from cappy.evaluation.verdict import verdict

        rows = self.table()
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            f"{row[0]:<{widths[0]}}  "
            + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
            for row in rows
        ]
        return "\n".join([*lines, "", *verdict(self), "", advice(self)]) + "\n"


def check_schema(values: Mapping[str, Any]) -> None:
    """RecordError where the values of a report.json are of another schema than this version writes."""
    found = values.get("schema", 1)
    if not isinstance(found, int) or found > SCHEMA:
        raise RecordError(
            f"report: has schema {shown(found)}, this version reads {SCHEMA}; update cappy, or evaluate again with it"
        )
    if found < SCHEMA:
        raise RecordError(f"report: has schema {found}, this version reads {SCHEMA}; evaluate again")


def sides(key: str) -> tuple[str, str]:
    """The names of the two selectors that a comparison's key stands for, as a person reads them."""
    names = {**SELECTORS, "likelihood": "better likelihood"}
    one, _, other = key.partition("-")
    return names[one], names[other]


def spread(interval: Estimate | Difference) -> str:
    """The ends of an interval, x 100."""
    return f"{percent(interval.low)} to {percent(interval.high)}"
