"""The best-of-n plot."""

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cappy.evaluation.report import SELECTORS, Report
from cappy.pages.plot import INK, QUIET, drawing, plain_axes, to_png, to_svg
from cappy.pages.words import metric_name

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
    COLOURS[name]: f"var(--{name.replace('_', '-')})" for name in COLOURS if name not in ("oracle", "random")
}
BANDS = ("scorer", "mbr")
_DASHED = {"oracle": (0, (5, 3)), "random": (0, (1, 2))}


def svg(report: Report, *, width: float, height: float) -> str:
    """The plot as an SVG element, `width` by `height` inches, its colours the page's variables."""
    return to_svg(_figure(report, width, height), salt=f"cappy {width}", variables=VARIABLES)


def png(report: Report) -> bytes:
    """The plot on white, for places that show pictures only."""
    return to_png(_figure(report, 7.4, 4.2))


def _figure(report: Report, width: float, height: float) -> Figure:
    with drawing(width, height) as figure:
        axes = plain_axes(figure, "candidates sampled (n)", f"{metric_name(report.metric)} ×100")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for name, colour in COLOURS.items():
            if name in report.curve:
                _line(axes, report, name, colour)
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
