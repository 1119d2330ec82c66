"""The plots of a data report: where the labels lie, and how long the texts are."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from cappy.annotation.report.record import NUM_BINS, DataReport, Lengths
from cappy.annotation.report.tables import selectable_sources
from cappy.pages.plot import INK, QUIET, drawing, plain_axes, to_svg

COLOURS: Mapping[str, str] = {"llm": "#1d5fd0", "choice": "#c2500a"}
VARIABLES: Mapping[str, str] = {colour: f"var(--{source})" for source, colour in COLOURS.items()}
_NAMES = {"llm": "LLM responses", "choice": "choices"}
_APART = 0.05
"""Distance of the bars for exact 0 and exact 1 from the bins."""


def labels_svg(report: DataReport, *, width: float, height: float) -> str:
    """Share of the LLM responses and choices by label, exact 0 and exact 1 apart, as an SVG element."""
    edges = np.arange(NUM_BINS + 1) / NUM_BINS
    lefts = np.array([-_APART - 1 / NUM_BINS, *edges[:-1], 1 + _APART])
    sources = selectable_sources(report)
    every = sum(report.sources[source].count for source in sources)
    with drawing(width, height) as figure:
        axes = plain_axes(figure, "label", "% of responses and choices")
        below = np.zeros(len(lefts))
        for source in sources:
            shares = 100 * np.array(report.sources[source].cells) / every
            axes.bar(
                lefts, shares, 0.92 / NUM_BINS, bottom=below, align="edge", color=COLOURS[source], label=_NAMES[source]
            )
            below += shares
        axes.grid(visible=False, axis="x")
        outer = (lefts[0] + 0.5 / NUM_BINS, lefts[-1] + 0.5 / NUM_BINS)
        axes.set_xticks([outer[0], 0.2, 0.4, 0.6, 0.8, outer[1]])
        axes.set_xticklabels(["exactly\n0", "0.2", "0.4", "0.6", "0.8", "exactly\n1"])
        figure.legend(loc="outside upper left", ncols=2, frameon=False, labelcolor=INK, handlelength=1)
        return to_svg(figure, salt=f"cappy labels {width}", variables=VARIABLES)


def lengths_svg(report: DataReport, *, width: float, height: float) -> str:
    """The spread of the texts' words on a logarithmic scale, as an SVG element."""
    held = {name: lengths for name, lengths in report.words.items() if lengths.texts}
    with drawing(width, height) as figure:
        axes = plain_axes(figure, "words (logarithmic; line 5% to 95%, box 25% to 75%, dot median)", "")
        if width < 5:
            axes.set_xlabel("words (logarithmic)", color=QUIET)
        for row, lengths in enumerate(held.values()):
            _box(axes, -row, lengths)
        axes.set_yticks([-row for row in range(len(held))], list(held))
        axes.set_ylim(0.6 - len(held), 0.6)
        axes.grid(visible=False, axis="y")
        ends = [[lengths.quantiles[key] for lengths in held.values()] for key in ("5", "95")]
        _logarithmic(axes, min(ends[0]), max(ends[1]), 6 if width < 5 else 12)
        return to_svg(figure, salt=f"cappy lengths {width}", variables=VARIABLES)


def _box(axes: Axes, y: float, lengths: Lengths) -> None:
    low, quarter, median, three_quarters, high = (lengths.quantiles[key] for key in ("5", "25", "50", "75", "95"))
    axes.plot([low, high], [y, y], color=QUIET, linewidth=1.4, solid_capstyle="butt")
    axes.plot([quarter, three_quarters], [y, y], color=COLOURS["llm"], linewidth=9, solid_capstyle="butt", alpha=0.45)
    axes.plot([median], [y], color=COLOURS["llm"], marker="o", markersize=6)


def _logarithmic(axes: Axes, shortest: int, longest: int, most: int) -> None:
    """At most `most` ticks, so that none overlap; where there are blank texts the scale begins at 0, linear up to 1."""
    low, high = 0.7 * shortest if shortest else -0.15, 1.4 * max(longest, 1)
    for steps in (range(1, 10), (1, 2, 5), (1, 3), (1,)):
        every = [0, *(step * 10**power for power in range(len(str(longest)) + 1) for step in steps)]
        ticks = [tick for tick in every if low <= tick <= high]
        if len(ticks) <= most:
            break
    axes.set_xscale("symlog", linthresh=1, linscale=0.3)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, [f"{tick // 1000:,}k" if tick >= 1000 else str(tick) for tick in ticks])
    axes.set_xlim(low, high)
