"""The report as Markdown: for a pull request, a model card, a chat."""

from cappy.evaluation.advice import advice
from cappy.evaluation.report import Report
from cappy.evaluation.verdict import verdict
from cappy.pages.words import metric_name, percent, signed, table, text


def render(report: Report) -> str:
    """The verdict, the advice and the tables of selectors and tasks."""
    headline, *sentences = verdict(report)
    measured = f"{report.facts['instances']} {report.split} instances, with 95% intervals"
    parts = [
        f"# {text(headline)}",
        f"**{text(advice(report))}**",
        "\n".join(f"- {text(sentence)}" for sentence in sentences),
        text(f"Mean {metric_name(report.metric)} ×100 over {measured}."),
        table(report.table()),
        "## By task",
        table(_tasks(report)),
    ]
    if report.probes:
        parts += ["## Probes", "\n".join(f"- {text(f'{probe.name}: {probe.meaning}')}" for probe in report.probes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _tasks(report: Report) -> list[tuple[str, ...]]:
    names = [
        name for name in ("random", "mbr", "champion", "scorer", "hybrid_mbr", "oracle") if name in report.selectors
    ]
    rows = [("task", "instances", *names, "gain over random")]
    for row in report.tasks:
        means = (percent(row.means[name]) for name in names)
        rows.append((row.task or "(no task)", str(row.instances), *means, signed(row.gain.difference)))
    return rows
