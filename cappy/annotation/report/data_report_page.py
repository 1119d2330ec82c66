"""Renders the data report as one self-contained HTML page with plots, and writes its files."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from cappy.annotation.report.candidates import COLUMNS, list_names, metrics_of
from cappy.annotation.report.record import NUM_BINS, DataReport, Labels, LengthSummary, PoolStatistics
from cappy.annotation.report.summary import summarize
from cappy.annotation.report.text import (
    DEFINITIONS,
    MAX_ROWS,
    build_tables,
    describe_findings,
    selectable_sources,
    to_values,
)
from cappy.errors import ConfigError, RecordError
from cappy.pages import metric_name
from cappy.pages.page import INK, QUIET, draw_figure, plain_axes, render_template, to_svg
from cappy.progress import Progress, silent
from cappy.records import Manifest, read_batches, read_manifest
from cappy.records.folder import write_bytes

_WIDE_SCREEN_COLUMNS = frozenset(
    {
        *("candidates", "selectable", "headroom", "no\nsignal", "ties", "tied\nbest", "effective"),
        *("exactly\n0", "blank", "texts", "25%", "75%", "99%"),
    }
)
"""Columns that narrow screens hide."""
_COLOURS: Mapping[str, str] = {"llm": "#1d5fd0", "choice": "#c2500a"}
_CSS_VARIABLES: Mapping[str, str] = {colour: f"var(--{source})" for source, colour in _COLOURS.items()}
_NAMES = {"llm": "LLM responses", "choice": "choices"}
_BAR_GAP = 0.05
"""Distance of the bars for exact 0 and exact 1 from the bins."""


def write_report(folder: Path, target: Path, metric: str | None = None, progress: Progress = silent) -> DataReport:
    """Writes the data report of a finished folder to `target` as report.html and report.json, and returns it.

    The folder is read once, in bounded memory. The default metric is the one that the folder was annotated with. Raises
    FolderError if the folder is unfinished or damaged, ConfigError if `metric` is None and the manifest names none, and
    RecordError if a candidate has no label of the metric, or a label outside 0 to 1.
    """
    manifest = read_manifest(folder)
    name = metric or _find_metric(folder, manifest)
    batches = _count_rows(read_batches(folder, columns=COLUMNS), progress, manifest.rows)
    try:
        report = summarize(batches, name)
    except RecordError as error:
        raise RecordError(f"{folder}: {error}") from error
    write_page(report, target)
    return report


def write_page(report: DataReport, folder: Path) -> None:
    """Writes `report.html`, one self-contained file, and `report.json` with all numbers."""
    values = json.dumps(to_values(report), indent=1, ensure_ascii=False, allow_nan=False)
    write_bytes(folder / "report.json", f"{values}\n".encode())
    write_bytes(folder / "report.html", render(report).encode())


def render(report: DataReport) -> str:
    """Renders the page; all text from the data is escaped."""
    return render_template(
        "annotation/report/data_report_page.jinja",
        {},
        report=report,
        findings=describe_findings(report),
        metric=metric_name(report.metric),
        tables=build_tables(report),
        definitions=DEFINITIONS,
        wide_screen_columns=_WIDE_SCREEN_COLUMNS,
        max_rows=MAX_ROWS,
        split_bars=_bar_positions([*report.splits.values(), report.total]),
        task_bars=_bar_positions(list(report.tasks.values())),
        source_sparklines=[_sparkline_heights(labels) for labels in report.sources.values()],
        generator_sparklines=[_sparkline_heights(generator.labels) for generator in report.generators],
        plots=_render_plots(report),
    )


def _render_plots(report: DataReport) -> dict[str, tuple[Markup, Markup]]:
    """Plot name -> its SVG for wide and for narrow screens; plots without data are left out."""
    plots = {}
    # matplotlib makes them from numbers and fixed names only, so they need no escaping.
    if any(report.sources[source].count for source in selectable_sources(report)):
        sizes = ((10.2, 3.6), (3.7, 3.0))
        plots["labels"] = [Markup(_draw_labels(report, width=w, height=h)) for w, h in sizes]  # noqa: S704
    if any(lengths.num_texts for lengths in report.words.values()):
        sizes = ((10.2, 2.2), (3.7, 2.2))
        plots["lengths"] = [Markup(_draw_lengths(report, width=w, height=h)) for w, h in sizes]  # noqa: S704
    return {name: (wide, narrow) for name, (wide, narrow) in plots.items()}


def _bar_positions(pools: Sequence[PoolStatistics]) -> list[tuple[float, float] | None]:
    """Start and width of the bar from random to oracle, in percent of the scale of labels."""
    return [
        None if each.random is None or each.oracle is None else (100 * each.random, 100 * (each.oracle - each.random))
        for each in pools
    ]


def _sparkline_heights(labels: Labels) -> list[float]:
    """Heights of a histogram's bars in percent of the highest."""
    highest = max(labels.bin_counts) or 1
    return [100 * count / highest for count in labels.bin_counts]


def _draw_labels(report: DataReport, *, width: float, height: float) -> str:
    """Histogram of the labels of LLM responses and choices, with separate bars for exact 0 and 1, as an SVG element."""
    edges = np.arange(NUM_BINS + 1) / NUM_BINS
    lefts = np.array([-_BAR_GAP - 1 / NUM_BINS, *edges[:-1], 1 + _BAR_GAP])
    sources = selectable_sources(report)
    total = sum(report.sources[source].count for source in sources)
    with draw_figure(width, height) as figure:
        axes = plain_axes(figure, "label", "% of responses and choices")
        below = np.zeros(len(lefts))
        for source in sources:
            shares = 100 * np.array(report.sources[source].bin_counts) / total
            axes.bar(
                lefts, shares, 0.92 / NUM_BINS, bottom=below, align="edge", color=_COLOURS[source], label=_NAMES[source]
            )
            below += shares
        axes.grid(visible=False, axis="x")
        outer = (lefts[0] + 0.5 / NUM_BINS, lefts[-1] + 0.5 / NUM_BINS)
        axes.set_xticks([outer[0], 0.2, 0.4, 0.6, 0.8, outer[1]])
        axes.set_xticklabels(["exactly\n0", "0.2", "0.4", "0.6", "0.8", "exactly\n1"])
        figure.legend(loc="outside upper left", ncols=2, frameon=False, labelcolor=INK, handlelength=1)
        return to_svg(figure, salt=f"cappy labels {width}", variables=_CSS_VARIABLES)


def _draw_lengths(report: DataReport, *, width: float, height: float) -> str:
    """Box plots of the lengths of texts in words on a logarithmic scale, as an SVG element."""
    nonempty = {name: lengths for name, lengths in report.words.items() if lengths.num_texts}
    with draw_figure(width, height) as figure:
        axes = plain_axes(figure, "words (logarithmic; line 5% to 95%, box 25% to 75%, dot median)", "")
        if width < 5:
            axes.set_xlabel("words (logarithmic)", color=QUIET)
        for row, lengths in enumerate(nonempty.values()):
            _draw_box(axes, -row, lengths)
        axes.set_yticks([-row for row in range(len(nonempty))], list(nonempty))
        axes.set_ylim(0.6 - len(nonempty), 0.6)
        axes.grid(visible=False, axis="y")
        ends = [[lengths.quantiles[key] for lengths in nonempty.values()] for key in ("5", "95")]
        _scale_axis(axes, min(ends[0]), max(ends[1]), 6 if width < 5 else 12)
        return to_svg(figure, salt=f"cappy lengths {width}", variables=_CSS_VARIABLES)


def _draw_box(axes: Axes, y: float, lengths: LengthSummary) -> None:
    low, quarter, median, three_quarters, high = (lengths.quantiles[key] for key in ("5", "25", "50", "75", "95"))
    axes.plot([low, high], [y, y], color=QUIET, linewidth=1.4, solid_capstyle="butt")
    axes.plot([quarter, three_quarters], [y, y], color=_COLOURS["llm"], linewidth=9, solid_capstyle="butt", alpha=0.45)
    axes.plot([median], [y], color=_COLOURS["llm"], marker="o", markersize=6)


def _scale_axis(axes: Axes, shortest: int, longest: int, max_ticks: int) -> None:
    """Sets a logarithmic scale with at most `max_ticks` ticks; with blank texts it is linear from 0 to 1."""
    low, high = 0.7 * shortest if shortest else -0.15, 1.4 * max(longest, 1)
    for steps in (range(1, 10), (1, 2, 5), (1, 3), (1,)):
        values = [0, *(step * 10**power for power in range(len(str(longest)) + 1) for step in steps)]
        ticks = [tick for tick in values if low <= tick <= high]
        if len(ticks) <= max_ticks:
            break
    axes.set_xscale("symlog", linthresh=1, linscale=0.3)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, [f"{tick // 1000:,}k" if tick >= 1000 else str(tick) for tick in ticks])
    axes.set_xlim(low, high)


def _find_metric(folder: Path, manifest: Manifest) -> str:
    """The metric that the folder was annotated with. Raises ConfigError if the manifest names none."""
    metric = manifest.config.get("metric") if manifest.step == "annotation" else None
    if isinstance(metric, str):
        return metric
    batch = next(read_batches(folder, columns=["candidates.list.element.labels"]), None)
    names = metrics_of(batch["candidates"].flatten().field("labels")) if batch is not None else []
    remedy = f"choose one of {list_names(names)}" if names else "it has no labels: run cappy annotation first"
    raise ConfigError(f"{folder}: its manifest names no metric (step {manifest.step or 'unknown'}); {remedy}")


def _count_rows(batches: Iterable[pa.RecordBatch], progress: Progress, total: int) -> Iterator[pa.RecordBatch]:
    done = 0
    progress(done, total, unit="instances")
    for batch in batches:
        yield batch
        done += batch.num_rows
        progress(done, total, unit="instances")
