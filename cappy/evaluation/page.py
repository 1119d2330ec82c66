"""The report as one self-contained HTML page."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from cappy.evaluation import plot
from cappy.evaluation.report import SELECTORS, Report, TaskRow, spread
from cappy.evaluation.tuning import WEIGHTS
from cappy.evaluation.verdict import outcome, verdict
from cappy.pages.template import template
from cappy.pages.words import metric_name, percent, signed

_TASK_COLUMNS = ("random", "likelihood", "mbr", "champion", "scorer", "hybrid_mbr", "oracle")
_COMPARED = {**SELECTORS, "likelihood": "better likelihood"}


def render(report: Report) -> str:
    """The page; every text of the data in it is escaped."""
    filters = {"percent": percent, "signed": signed, "spread": spread}
    return template("evaluation", filters).render(
        report=report,
        verdict=verdict(report),
        names=SELECTORS,
        metric=metric_name(report.metric),
        bars=_bars(report),
        comparisons=[(*_sides(key), value, outcome(value)) for key, value in report.comparisons.items()],
        columns=_columns(report),
        means=_means,
        weights=", ".join(f"{weight:g}" for weight in WEIGHTS),
        # Made by matplotlib from numbers and fixed names alone.
        wide=Markup(plot.svg(report, width=10.2, height=4.6)),  # noqa: S704
        narrow=Markup(plot.svg(report, width=3.7, height=3.7)),  # noqa: S704
    )


def _bars(report: Report) -> Mapping[str, Mapping[str, float]]:
    """Where each selector's interval lies between the lowest and the highest of all, in percent of the width."""
    estimates = {name: row.estimate for name, row in report.selectors.items()}
    low = min(estimate.low for estimate in estimates.values())
    width = max(estimate.high for estimate in estimates.values()) - low or 1.0
    return {
        name: {
            "left": 100 * (estimate.low - low) / width,
            "width": 100 * (estimate.high - estimate.low) / width,
            "mean": 100 * (estimate.mean - low) / width,
        }
        for name, estimate in estimates.items()
    }


def _sides(key: str) -> tuple[str, str]:
    one, _, other = key.partition("-")
    return _COMPARED[one], _COMPARED[other]


def _columns(report: Report) -> list[tuple[str, str]]:
    """The selectors of the per-task table, with their names."""
    named = [report.better_likelihood if name == "likelihood" else name for name in _TASK_COLUMNS]
    return [(name, SELECTORS[name]) for name in named if name in report.selectors]


def _means(row: TaskRow, columns: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """The cells of a task's row; the best one, the oracle aside, is marked."""
    best = max(row.means[name] for name, _ in columns if name != "oracle")
    return [{"mean": row.means[name], "best": name != "oracle" and row.means[name] == best} for name, _ in columns]
