"""The report: converts findings to JSON values and back, to a terminal table, and to Markdown."""

from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from cappy.errors import RecordError, quote
from cappy.evaluation.findings import SCHEMA, Findings, ReportValues, format_interval
from cappy.evaluation.verdict import advice, verdict
from cappy.pages import escape_text, format_signed, metric_name, percent, table
from cappy.selection.selectors import selectors_shown_in, title
from cappy.untrusted import JSON


@dataclass(frozen=True, kw_only=True)
class Report(Findings):
    """All results of an evaluation; the fields are those of `Findings`, some of which have another name in JSON."""

    def to_dict(self) -> dict[str, JSON]:
        """The report as JSON values: the numbers, with the verdict and the advice as text."""
        values: dict[str, JSON] = TypeAdapter(Report).dump_python(self, mode="json", by_alias=True)
        return {"verdict": list(verdict(self)), "next": advice(self), **values}

    @staticmethod
    def from_dict(values: ReportValues) -> "Report":
        """The inverse of `to_dict`. Raises RecordError if the values are not a report, or have another schema."""
        check_schema(values)
        fields = {key: value for key, value in values.items() if key not in ("verdict", "next")}
        try:
            return TypeAdapter(Report).validate_python(fields)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise RecordError(
                f"report: {field}: {first['msg']}, got {quote(first['input'])}; evaluate again"
            ) from error

    def metrics(self) -> dict[str, float]:
        """The metrics of the run, by name, for the manifest and for tracking."""
        numbers = {"num_instances": float(self.facts["instances"])}
        for name, row in self.selectors.items():
            numbers[f"{self.metric}_{name}"] = row.estimate.mean
        for key, difference in self.comparisons.items():
            subject, _, rival = key.partition("-")
            if subject == "selector" or key == "scorer-initial":
                prefix = "" if subject == "selector" else "scorer_"
                numbers[f"{prefix}gain_over_{rival}"] = difference.difference
                numbers[f"{prefix}gain_over_{rival}_low"] = difference.low
        if self.calibration is not None:
            best = self.calibration.calibrated or self.calibration.raw
            numbers |= {"ece": best.ece, "brier": best.brier}
        numbers |= {f"probe_{probe.name.replace(' ', '_')}": probe.value for probe in self.probes}
        return numbers | {f"leaks_{name}": float(count) for name, count in self.leaks.items()}

    def table(self) -> list[tuple[str, str, str, str]]:
        """Rows for a terminal, header first: selector, mean x 100, its interval, gain over random with its interval."""
        rows = [("selector", f"{metric_name(self.metric)} x100", "95% interval", "gain over random")]
        for selector in selectors_shown_in(self.selectors, "table", self.better_likelihood_selector):
            row = self.selectors[selector.name]
            gain = (
                "" if selector.name == "random" else f"{format_signed(row.gain.difference)} {format_interval(row.gain)}"
            )
            label = f"{selector.title} ({row.detail})" if row.detail else selector.title
            rows.append((label, percent(row.estimate.mean), format_interval(row.estimate), gain))
        return rows

    def text(self) -> str:
        """The table, the verdict and the advice, as plain text."""
        rows = self.table()
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            f"{row[0]:<{widths[0]}}  "
            + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
            for row in rows
        ]
        return "\n".join([*lines, "", *verdict(self), "", advice(self)]) + "\n"

    def markdown(self) -> str:
        """The verdict, the advice and the tables of selectors and tasks, for a pull request or a model card."""
        headline, *sentences = verdict(self)
        scope = f"{self.facts['instances']} {self.split} instances, with 95% intervals"
        parts = [
            f"# {escape_text(headline)}",
            f"**{escape_text(advice(self))}**",
            "\n".join(f"- {escape_text(sentence)}" for sentence in sentences),
            escape_text(f"Mean {metric_name(self.metric)} ×100 over {scope}."),
            table(self.table()),
            "## By task",
            table(self._task_rows()),
        ]
        if self.probes:
            probes = (f"- {escape_text(f'{probe.name}: {probe.meaning}')}" for probe in self.probes)
            parts += ["## Probes", "\n".join(probes)]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _task_rows(self) -> list[tuple[str, ...]]:
        """The rows of the table by task, without the likelihood selectors."""
        names = [selector.name for selector in selectors_shown_in(self.selectors, "tasks")]
        rows = [("task", "instances", *map(title, names), "gain over random")]
        for row in self.tasks:
            means = (percent(row.means[name]) for name in names)
            rows.append((row.task or "(no task)", str(row.instances), *means, format_signed(row.gain.difference)))
        return rows


def check_schema(values: ReportValues) -> None:
    """Raises RecordError if the values of a report.json have another schema than this version writes."""
    schema = values.get("schema", 1)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise RecordError(
            f"report: has schema {quote(schema)}, this version reads {SCHEMA}; update cappy, or evaluate again"
        )
    if schema < SCHEMA:
        raise RecordError(f"report: has schema {schema}, this version reads {SCHEMA}; evaluate again")
