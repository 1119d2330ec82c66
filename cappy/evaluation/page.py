"""Renders the report as one self-contained HTML page with two plots: best of n, and calibration."""

from collections.abc import Callable, Mapping
from functools import partial

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cappy.evaluation.findings import CalibrationResult, Coverage, PublishedTask, TaskRow, format_interval
from cappy.evaluation.report import Report
from cappy.evaluation.verdict import advice, outcome, verdict
from cappy.pages import format_signed, metric_name, percent
from cappy.pages.page import INK, QUIET, draw_figure, plain_axes, render_template, to_png, to_svg, to_svg_file
from cappy.selection.selectors import SelectorSpec, selectors_shown_in, title

COLOURS: Mapping[str, str] = {
    "oracle": INK,
    "selector": "#1d5fd0",
    "scorer": "#4d8f1f",
    "champion": "#8430ce",
    "initial": "#a03c78",
    "mbr": "#c2500a",
    "likelihood_sum": "#0b7a6b",
    "likelihood_mean": "#0b7a6c",
    "random": QUIET,
}
"""Colours of selectors. All differ, some by one digit only, because `to_svg` replaces each by its own CSS variable."""
VARIABLES: Mapping[str, str] = {
    COLOURS[name]: f"var(--{name.replace('_', '-')})" for name in COLOURS if name not in ("oracle", "random")
} | {"#0b7a6d": "var(--likelihood-mean)"}
"""Colour -> the CSS variable that replaces it in the page."""
CALIBRATED_COLOUR = "#0b7a6d"
DEFAULT_COLOUR = "#8a6d3b"
"""Colour of selectors without an entry in `COLOURS`, readable on light and dark backgrounds."""
Draw = Callable[[float, float], Figure]
"""Draws a plot of a width and a height in inches."""
Sizes = tuple[tuple[float, float], tuple[float, float]]
"""(width, height) of a plot in inches, on a wide and on a narrow page."""
SELECTORS_WITH_BANDS = ("selector", "mbr")
_LINE_STYLES = {"oracle": (0, (5, 3)), "random": (0, (1, 2))}


def render(report: Report) -> str:
    """Renders the page; all text from the data is escaped."""
    filters: dict[str, Callable[..., str]] = {"percent": percent, "signed": format_signed, "interval": format_interval}
    return render_template(
        "evaluation/page.jinja",
        filters,
        report=report,
        verdict=verdict(report),
        title=title,
        metric=metric_name(report.metric),
        bars=_bars(report),
        comparisons=[
            (key, *map(title, key.split("-")), value, outcome(value)) for key, value in report.comparisons.items()
        ],
        columns=selectors_shown_in(report.selectors, "tasks", report.better_likelihood_selector),
        means=_mean_cells,
        advice=advice(report),
        steps=_curve_steps(report),
        template_ranges=_template_ranges(report),
        published=_group_published(report),
        # matplotlib makes them from numbers and fixed names only, so they need no escaping.
        plots={name: tuple(map(Markup, both)) for name, both in _render_plots(report).items()},
    )


def plot_files(report: Report) -> dict[str, bytes]:
    """File name -> the plot on a white background, for viewers that show images only."""
    files = {}
    for name, (draw, _) in _list_plots(report).items():
        files[f"{name}.png"] = to_png(draw(7.4, 4.2))
        files[f"{name}.svg"] = to_svg_file(draw(7.4, 4.2), salt=f"cappy {name}")
    return files


def _bars(report: Report) -> Mapping[str, Mapping[str, float]]:
    """Left end, width and mean of each selector's interval, in percent of the range of all intervals."""
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


def _mean_cells(row: TaskRow, columns: list[SelectorSpec]) -> list[dict[str, float | bool]]:
    """The cells of a task's row; `best` marks the highest mean of all selectors but the oracle."""
    best = max(row.means[column.name] for column in columns if column.bound != "upper")
    return [
        {"mean": row.means[column.name], "best": column.bound != "upper" and row.means[column.name] == best}
        for column in columns
    ]


def _curve_steps(report: Report) -> list[dict[str, float | None]]:
    """Mean label and cost of the selector's pick from n candidates.

    n is a power of two, `num_worthwhile_candidates`, or all.
    """
    points = [point.mean for point in report.curve.get("selector", ())]
    if not points:
        return []
    size = len(points)
    chosen = sorted({n for n in (1, 2, 4, 8, 16, 32, 64, report.num_worthwhile_candidates, size) if n <= size})
    return [_curve_step(report, points, n) for n in chosen]


def _curve_step(report: Report, points: list[float], n: int) -> dict[str, float | None]:
    gain = points[n - 1] - points[0]
    tokens, seconds = (None if each is None else each * n for each in (report.cost.tokens, report.cost.seconds))
    more_tokens = None if tokens is None or report.cost.tokens is None else tokens - report.cost.tokens
    per_point = more_tokens / (100 * gain) if more_tokens and gain > 0 else None
    return {"n": n, "mean": points[n - 1], "gain": gain, "tokens": tokens, "seconds": seconds, "per_point": per_point}


def _template_ranges(report: Report) -> list[tuple[str, int, float, float, float]]:
    """Task, number of templates, and the lowest, mean and highest accuracy over them."""
    rows = [(row.task, list(row.templates.values())) for row in report.tasks if len(row.templates) > 1]
    return [
        (task, len(accuracies), min(accuracies), sum(accuracies) / len(accuracies), max(accuracies))
        for task, accuracies in rows
    ]


def _group_published(report: Report) -> list[tuple[str, list[str], list[PublishedTask]]]:
    """The published tasks of the report by source: (source, names of its models, tasks)."""
    sources: dict[str, list[PublishedTask]] = {}
    for row in report.published:
        sources.setdefault(row.source, []).append(row)
    return [(source, list(rows[0].numbers), rows) for source, rows in sources.items()]


def _render_plots(report: Report) -> dict[str, tuple[str, str]]:
    """Plot name -> its SVG elements for a wide and for a narrow page, with CSS variables as colours."""
    return {
        name: tuple(  # type: ignore[misc]
            to_svg(draw(*size), salt=f"cappy {name} {size[0]}", variables=VARIABLES) for size in sizes
        )
        for name, (draw, sizes) in _list_plots(report).items()
    }


def _list_plots(report: Report) -> Mapping[str, tuple[Draw, Sizes]]:
    """Plot name -> its function and sizes."""
    plots: dict[str, tuple[Draw, Sizes]] = {"curve": (partial(_draw_curve, report), ((10.2, 4.6), (3.7, 3.7)))}
    if report.calibration is not None and report.coverage is not None:
        draw = partial(_draw_calibration, metric_name(report.metric), report.calibration, report.coverage)
        plots["calibration"] = (draw, ((10.2, 4.2), (3.7, 7.0)))
    return plots


def _draw_curve(report: Report, width: float, height: float) -> Figure:
    with draw_figure(width, height) as figure:
        axes = plain_axes(figure, "candidates sampled (n)", f"{metric_name(report.metric)} ×100")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for name in [*COLOURS, *(name for name in report.curve if name not in COLOURS)]:
            if name in report.curve:
                _draw_line(axes, report, name, COLOURS.get(name, DEFAULT_COLOUR))
        _draw_legend(figure, axes, width)
    return figure


def _draw_calibration(
    metric: str, calibration: CalibrationResult, coverage: Coverage, width: float, height: float
) -> Figure:
    """Draws the reliability diagram on the left (or top), and the mean label by coverage on the right (or bottom)."""
    wide = width > height
    with draw_figure(width, height) as figure:
        axes = plain_axes(figure, "score ×100", f"mean {metric} ×100", (1, 2, 1) if wide else (2, 1, 1))
        lows = [min(each.score, each.label) for each in calibration.raw.bins]
        ends = [100 * min(0.0, *lows), 100 * max(1.0, *(each.score for each in calibration.raw.bins))]
        axes.plot(ends, ends, color=QUIET, linestyle=(0, (1, 2)), linewidth=1.2, label="perfect")
        for label, reliability, colour in (
            ("raw", calibration.raw, COLOURS["selector"]),
            ("calibrated", calibration.calibrated, CALIBRATED_COLOUR),
        ):
            if reliability is not None:
                points = [(100 * each.score, 100 * each.label) for each in reliability.bins]
                axes.plot(
                    *zip(*points, strict=True), color=colour, marker="o", markersize=4, linewidth=1.6, label=label
                )
        axes.legend(frameon=False, labelcolor=INK, loc="upper left")
        right = plain_axes(figure, "instances answered (%)", f"mean {metric} ×100", (1, 2, 2) if wide else (2, 1, 2))
        shares = [100 * share for share in coverage.coverage]
        right.plot(
            shares, [100 * value for value in coverage.quality], color=COLOURS["selector"], marker="o", markersize=4
        )
        right.axhline(100 * coverage.random, color=QUIET, linestyle=(0, (1, 2)), linewidth=1.2)
        right.invert_xaxis()
    return figure


def _draw_legend(figure: Figure, axes: Axes, width: float) -> None:
    handles, _ = axes.get_legend_handles_labels()
    columns = len(handles) if width > 5 else 2
    figure.legend(loc="outside upper left", ncols=columns, frameon=False, labelcolor=INK, handlelength=1.8)


def _draw_line(axes: Axes, report: Report, name: str, colour: str) -> None:
    points = report.curve[name]
    n = range(1, len(points) + 1)
    axes.plot(
        n,
        [100 * point.mean for point in points],
        color=colour,
        linewidth=1.8,
        linestyle=_LINE_STYLES.get(name, "solid"),
        marker="o" if len(points) <= 20 else "",
        markersize=3,
        label=title(name),
    )
    if name not in SELECTORS_WITH_BANDS:
        return
    lows, highs = ([100 * getattr(point, end) for point in points] for end in ("low", "high"))
    axes.fill_between(n, lows, highs, color=colour, alpha=0.13, linewidth=0)
