"""The data report as one self-contained HTML page."""

from collections.abc import Sequence

from markupsafe import Markup

from cappy.annotation.report import plot, tables
from cappy.annotation.report.findings import findings
from cappy.annotation.report.record import DataReport, Labels, Pools
from cappy.annotation.report.text import MOST_ROWS
from cappy.pages import template
from cappy.pages.words import metric_name

EXTRA = frozenset(
    {
        *("candidates", "selectable", "room", "no\nsignal", "ties", "tied\nbest", "effective"),
        *("exactly\n0", "blank", "texts", "25%", "75%", "99%"),
    }
)
"""Columns that a narrow screen leaves out."""


def render(report: DataReport) -> str:
    """The page; every text of the data in it is escaped."""
    return template.render(
        "annotation/report",
        {},
        report=report,
        findings=findings(report),
        metric=metric_name(report.metric),
        tables=tables,
        extra=EXTRA,
        most_rows=MOST_ROWS,
        split_bars=_bars([*report.splits.values(), report.total]),
        task_bars=_bars(list(report.tasks.values())),
        source_sparks=[_spark(labels) for labels in report.sources.values()],
        generator_sparks=[_spark(generator.labels) for generator in report.generators],
        plots=_plots(report),
    )


def _plots(report: DataReport) -> dict[str, tuple[Markup, Markup]]:
    """Name -> the plot for wide screens and the one for narrow ones; what has nothing to show is left out."""
    drawn = {}
    # Made by matplotlib from numbers and fixed names alone.
    if any(report.sources[source].count for source in tables.selectable_sources(report)):
        sizes = ((10.2, 3.6), (3.7, 3.0))
        drawn["labels"] = [Markup(plot.labels_svg(report, width=w, height=h)) for w, h in sizes]  # noqa: S704
    if any(lengths.texts for lengths in report.words.values()):
        sizes = ((10.2, 2.2), (3.7, 2.2))
        drawn["lengths"] = [Markup(plot.lengths_svg(report, width=w, height=h)) for w, h in sizes]  # noqa: S704
    return {name: (wide, narrow) for name, (wide, narrow) in drawn.items()}


def _bars(pools: Sequence[Pools]) -> list[tuple[float, float] | None]:
    """Where the bar from random to oracle begins and how wide it is, in percent of labels from 0 to 1."""
    return [
        None if each.random is None or each.oracle is None else (100 * each.random, 100 * (each.oracle - each.random))
        for each in pools
    ]


def _spark(labels: Labels) -> list[float]:
    """Heights of a histogram's bars in percent of the highest."""
    most = max(labels.cells) or 1
    return [100 * cell / most for cell in labels.cells]
