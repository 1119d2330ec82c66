"""The plots: best of n, and calibration."""

from collections.abc import Callable, Mapping
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cappy.evaluation.findings import Calibrated, Coverage
from cappy.evaluation.report import SELECTORS, Report
from cappy.pages.page import INK, QUIET, drawing, plain_axes, to_png, to_svg, to_svg_file
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
} | {"#0b7a6d": "var(--likelihood-mean)"}
MAPPED = "#0b7a6d"
Draw = Callable[[float, float], Figure]
Sizes = tuple[tuple[float, float], tuple[float, float]]
BANDS = ("scorer", "mbr")
_DASHED = {"oracle": (0, (5, 3)), "random": (0, (1, 2))}


def svgs(report: Report) -> dict[str, tuple[str, str]]:
    """Plot -> itself as SVG elements for a wide and a narrow page, their colours the page's variables."""
    return {
        name: tuple(  # type: ignore[misc]
            to_svg(draw(*size), salt=f"cappy {name} {size[0]}", variables=VARIABLES) for size in sizes
        )
        for name, (draw, sizes) in _plots(report).items()
    }


def files(report: Report) -> dict[str, bytes]:
    """File name -> the plot on white, for places that show pictures only."""
    found = {}
    for name, (draw, _) in _plots(report).items():
        found[f"{name}.png"] = to_png(draw(7.4, 4.2))
        found[f"{name}.svg"] = to_svg_file(draw(7.4, 4.2), salt=f"cappy {name}")
    return found


def _plots(report: Report) -> Mapping[str, tuple[Draw, Sizes]]:
    """The plots that a report has, with their sizes on a wide and on a narrow page, in inches."""
    plots: dict[str, tuple[Draw, Sizes]] = {"curve": (partial(_curve, report), ((10.2, 4.6), (3.7, 3.7)))}
    if report.calibration is not None and report.coverage is not None:
        draw = partial(_calibration, metric_name(report.metric), report.calibration, report.coverage)
        plots["calibration"] = (draw, ((10.2, 4.2), (3.7, 7.0)))
    return plots


def _curve(report: Report, width: float, height: float) -> Figure:
    with drawing(width, height) as figure:
        axes = plain_axes(figure, "candidates sampled (n)", f"{metric_name(report.metric)} ×100")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for name, colour in COLOURS.items():
            if name in report.curve:
                _line(axes, report, name, colour)
        _legend(figure, axes, width)
    return figure


def _calibration(metric: str, found: Calibrated, abstaining: Coverage, width: float, height: float) -> Figure:
    """Left (or above) the reliability diagram, right what abstaining buys."""
    wide = width > height
    with drawing(width, height) as figure:
        axes = plain_axes(figure, "score ×100", f"mean {metric} ×100", (1, 2, 1) if wide else (2, 1, 1))
        lows = [min(one.score, one.label) for one in found.raw.bins]
        ends = [100 * min(0.0, *lows), 100 * max(1.0, *(one.score for one in found.raw.bins))]
        axes.plot(ends, ends, color=QUIET, linestyle=(0, (1, 2)), linewidth=1.2, label="exact")
        for label, kind, colour in (
            ("as it is", found.raw, COLOURS["scorer"]),
            ("calibrated", found.calibrated, MAPPED),
        ):
            if kind is not None:
                points = [(100 * one.score, 100 * one.label) for one in kind.bins]
                axes.plot(
                    *zip(*points, strict=True), color=colour, marker="o", markersize=4, linewidth=1.6, label=label
                )
        axes.legend(frameon=False, labelcolor=INK, loc="upper left")
        right = plain_axes(
            figure, "instances answered, in percent", f"mean {metric} ×100", (1, 2, 2) if wide else (2, 1, 2)
        )
        shares = [100 * share for share in abstaining.coverage]
        right.plot(
            shares, [100 * value for value in abstaining.quality], color=COLOURS["scorer"], marker="o", markersize=4
        )
        right.axhline(100 * abstaining.random, color=QUIET, linestyle=(0, (1, 2)), linewidth=1.2)
        right.invert_xaxis()
    return figure


def _legend(figure: Figure, axes: Axes, width: float) -> None:
    handles, _ = axes.get_legend_handles_labels()
    columns = len(handles) if width > 5 else 2
    figure.legend(loc="outside upper left", ncols=columns, frameon=False, labelcolor=INK, handlelength=1.8)


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
