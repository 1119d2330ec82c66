"""The report as one self-contained HTML page."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from cappy.evaluation import plot
from cappy.evaluation.advice import advice
from cappy.evaluation.findings import Published, TaskRow
from cappy.evaluation.report import SELECTORS, Report, sides, spread
from cappy.evaluation.tuning import WEIGHTS
from cappy.evaluation.verdict import outcome, verdict
from cappy.pages.page import render_template
from cappy.pages.words import metric_name, percent, signed

_TASK_COLUMNS = ("random", "likelihood", "mbr", "champion", "scorer", "hybrid_mbr", "oracle")


def render(report: Report) -> str:
    """The page; every text of the data in it is escaped."""
    filters = {"percent": percent, "signed": signed, "spread": spread}
    return render_template(
        "evaluation",
        filters,
        report=report,
        verdict=verdict(report),
        names=SELECTORS,
        metric=metric_name(report.metric),
        bars=_bars(report),
        comparisons=[(key, *sides(key), value, outcome(value)) for key, value in report.comparisons.items()],
        columns=_columns(report),
        means=_means,
        weights=", ".join(f"{weight:g}" for weight in WEIGHTS),
        advice=advice(report),
        steps=_steps(report),
        spreads=_spreads(report),
        published=_published(report),
        # Made by matplotlib from numbers and fixed names alone.
        plots={name: tuple(map(Markup, both)) for name, both in plot.svgs(report).items()},
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


def _columns(report: Report) -> list[tuple[str, str]]:
    """The selectors of the per-task table, with their names."""
    named = [report.better_likelihood if name == "likelihood" else name for name in _TASK_COLUMNS]
    return [(name, SELECTORS[name]) for name in named if name in report.selectors]


def _means(row: TaskRow, columns: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """The cells of a task's row; the best one, the oracle aside, is marked."""
    best = max(row.means[name] for name, _ in columns if name != "oracle")
    return [{"mean": row.means[name], "best": name != "oracle" and row.means[name] == best} for name, _ in columns]


def _steps(report: Report) -> list[dict[str, float | None]]:
    """What each number of candidates is worth with the scorer, and costs: powers of two, where it pays, and all."""
    points = [point.mean for point in report.curve.get("scorer", ())]
    if not points:
        return []
    size = len(points)
    chosen = sorted({n for n in (1, 2, 4, 8, 16, 32, 64, report.pays_until, size) if n <= size})
    return [_step(report, points, n) for n in chosen]


def _step(report: Report, points: list[float], n: int) -> dict[str, float | None]:
    gain = points[n - 1] - points[0]
    tokens, seconds = (None if each is None else each * n for each in (report.cost.tokens, report.cost.seconds))
    added = None if tokens is None or report.cost.tokens is None else tokens - report.cost.tokens
    per_point = added / (100 * gain) if added and gain > 0 else None
    return {"n": n, "mean": points[n - 1], "gain": gain, "tokens": tokens, "seconds": seconds, "per_point": per_point}


def _spreads(report: Report) -> list[tuple[str, int, float, float, float]]:
    """Task, templates, and the lowest, mean and highest accuracy over them."""
    found = [(row.task, list(row.templates.values())) for row in report.tasks if len(row.templates) > 1]
    return [(task, len(own), min(own), sum(own) / len(own), max(own)) for task, own in found]


def _published(report: Report) -> list[tuple[str, list[str], list[Published]]]:
    """Source, its models, and the tasks that it shares with the report."""
    sources: dict[str, list[Published]] = {}
    for row in report.published:
        sources.setdefault(row.source, []).append(row)
    return [(source, list(rows[0].numbers), rows) for source, rows in sources.items()]
