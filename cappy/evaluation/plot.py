"""The best-of-n plot: as SVG that takes its colours from the page, and as PNG."""

import io
from collections.abc import Mapping

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cappy.evaluation.report import SELECTORS, Report, metric_name

INK, QUIET, GRID = "#1b1f24", "#5b6470", "#d9dde3"
COLOURS: Mapping[str, str] = {
    "oracle": INK,
    "scorer": "#1d5fd0",
    "champion": "#8430ce",
    "mbr": "#c2500a",
    "likelihood_sum": "#0b7a6b",
    "likelihood_mean": "#0b7a6c",
    "random": QUIET,
}
VARIABLES: Mapping[str, str] = {
    INK: "var(--ink)",
    QUIET: "var(--quiet)",
    GRID: "var(--line)",
    **{COLOURS[name]: f"var(--{name.replace('_', '-')})" for name in COLOURS if name not in ("oracle", "random")},
}
BANDS = ("scorer", "mbr")
_DASHED = {"oracle": (0, (5, 3)), "random": (0, (1, 2))}


def svg(report: Report, *, width: float, height: float) -> str:
    """The plot as an SVG element, `width` by `height` inches, its colours the page's variables."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"cappy {width}"}):
        _figure(report, width, height).savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    return text[text.index("<svg") :]


def png(report: Report) -> bytes:
    """The plot on white, for places that show pictures only."""
    figure = _figure(report, 7.4, 4.2)
    figure.set_facecolor("white")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()


def _figure(report: Report, width: float, height: float) -> Figure:
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 9.5, "text.color": INK}):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.set_facecolor("none")
        axes = figure.add_subplot()
        axes.set_facecolor("none")
        for name, colour in COLOURS.items():
            if name in report.curve:
                _line(axes, report, name, colour)
        _frame(axes, report)
        handles, _ = axes.get_legend_handles_labels()
        columns = len(handles) if width > 5 else 2
        figure.legend(loc="outside upper left", ncols=columns, frameon=False, labelcolor=INK, handlelength=1.8)
    return figure


def _line(axes: Axes, report: Report, name: str, colour: str) -> None:
    points = report.curve[name]
    n = range(1, len(points) + 1)
    axes.plot(
        n,
        [100 * point.mean for point in points],
        color=colour,
        linewidth=1.8,
        linestyle=_DASHED.get(name, "solid"),
        marker="o" if len(points) <= 20 else "",
        markersize=3,
        label=SELECTORS[name],
    )
    if name not in BANDS:
        return
    lows, highs = ([100 * getattr(point, end) for point in points] for end in ("low", "high"))
    axes.fill_between(n, lows, highs, color=colour, alpha=0.13, linewidth=0)


def _frame(axes: Axes, report: Report) -> None:
    axes.set_xlabel("candidates sampled (n)", color=QUIET)
    axes.set_ylabel(f"{metric_name(report.metric)} ×100", color=QUIET)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=QUIET, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
