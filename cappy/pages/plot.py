"""Plots with one look: as SVG that takes its colours from the page, and as PNG."""

import contextlib
import io
import re
from collections.abc import Iterator, Mapping

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, QUIET, GRID = "#1b1f24", "#5b6470", "#d9dde3"
VARIABLES: Mapping[str, str] = {INK: "var(--ink)", QUIET: "var(--quiet)", GRID: "var(--line)"}

_STYLE = re.compile(r"\s*<style\b[^>]*>[^<]*</style>")
"""A rule of matplotlib's for all lines. `style.jinja` has it, for a page applies no style but its template's."""


@contextlib.contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """A clear figure, `width` by `height` inches, to draw on inside the block."""
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 9.5, "text.color": INK}):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.set_facecolor("none")
        yield figure


def plain_axes(figure: Figure, x: str, y: str, place: tuple[int, int, int] = (1, 1, 1)) -> Axes:
    """Axes with a grid, without a frame, with what each direction measures; `place` is rows, columns and index."""
    axes = figure.add_subplot(*place)
    axes.set_facecolor("none")
    axes.set_xlabel(x, color=QUIET)
    axes.set_ylabel(y, color=QUIET)
    axes.grid(visible=True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=QUIET, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def to_svg(figure: Figure, *, salt: str, variables: Mapping[str, str]) -> str:
    """The figure as an SVG element: equal figures give equal text, and `variables` maps colours to the page's.

    `salt` keeps the names inside it apart from those of other plots of the page.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    for colour, variable in {**VARIABLES, **variables}.items():
        text = text.replace(colour, variable)
    return _STYLE.sub("", text[text.index("<svg") :])


def to_svg_file(figure: Figure, *, salt: str) -> bytes:
    """The figure on white as a file of its own, in its own colours; equal figures give equal bytes."""
    figure.set_facecolor("white")
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def to_png(figure: Figure) -> bytes:
    """The figure on white, for places that show pictures only."""
    figure.set_facecolor("white")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()
