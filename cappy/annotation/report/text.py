"""The data report for a terminal: at most 100 columns, without colours, the same when piped."""

import textwrap
from collections.abc import Iterable, Sequence

from rich.cells import cell_len, set_cell_size

from cappy.annotation.report import tables
from cappy.annotation.report.findings import findings
from cappy.annotation.report.record import DataReport
from cappy.annotation.report.tables import Row

WIDTH = 100
MOST_ROWS = 40
"""Rows of tasks and of generators; the rest is counted in a line."""
_NARROWEST_NAME = 8
_BAR = 30


def to_text(report: DataReport) -> str:
    """The findings and the tables; names are cut where they are too long, and made harmless where they are odd."""
    parts = ["\n".join(_words(report)), *(_tables(report) if report.total.instances else ())]
    return "\n\n".join(parts) + "\n"


def table(rows: Sequence[Row]) -> str:
    """Rows under one another, the header first: names to the left, numbers to the right, within `WIDTH` cells.

    Lines of a header's cell stand under one another.
    """
    header = [cell.split("\n") for cell in rows[0]]
    height = max(map(len, header))
    stacked = [tuple(([""] * (height - len(cell)) + cell)[line] for cell in header) for line in range(height)]
    every = [*stacked, *rows[1:]]
    widths = [max(cell_len(row[column]) for row in every) for column in range(1, len(header))]
    room = max(WIDTH - sum(widths) - 2 * len(widths), _NARROWEST_NAME)
    names = [cut(row[0], room) for row in every]
    first = max(map(cell_len, names))
    lines = (
        [name + " " * (first - cell_len(name)), *(f"{cell:>{w}}" for cell, w in zip(row[1:], widths, strict=True))]
        for name, row in zip(names, every, strict=True)
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)


def cut(name: str, room: int) -> str:
    """A name in one line, its middle left out where it is wider than `room` cells."""
    line = plain(name)
    if cell_len(line) <= room:
        return line
    tail = (room - 1) // 2
    end = line[-tail:]
    while cell_len(end) > tail:
        end = end[1:]
    return f"{set_cell_size(line, room - 1 - cell_len(end)).rstrip()}…{end}"


def plain(text: str) -> str:
    """A text with nothing in it that a terminal would obey."""
    return "".join(" " if c.isspace() else c if c.isprintable() else "�" for c in text)


def _words(report: DataReport) -> Iterable[str]:
    headline, *rest = map(plain, findings(report))
    yield from textwrap.wrap(headline, WIDTH)
    for sentence in rest:
        yield from textwrap.wrap(sentence, WIDTH, initial_indent="- ", subsequent_indent="  ")


def _tables(report: DataReport) -> Iterable[str]:
    yield table(tables.splits(report))
    header, *rows = tables.histogram(report, bar)
    yield table([(*header[:-1], header[-1].ljust(_BAR)), *rows])
    yield table(tables.sources(report))
    if report.generators:
        yield _folded(tables.generators(report), "generators")
    if report.tasks:
        yield _folded(tables.tasks(report), "tasks")
    yield table(tables.lengths(report))
    yield table(tables.repetition(report))
    yield "\n".join(_definitions())


def _definitions() -> Iterable[str]:
    for name, meaning in tables.DEFINITIONS.items():
        yield from textwrap.wrap(f"{name}: {meaning}", WIDTH, subsequent_indent="  ")


def _folded(rows: Sequence[Row], noun: str) -> str:
    more = len(rows) - 1 - MOST_ROWS
    return table(rows) if more <= 0 else f"{table(rows[: MOST_ROWS + 1])}\nand {more:,} more {noun}"


def bar(fraction: float) -> str:
    """A bar of a fraction of the width; what is not nothing shows."""
    return ("#" * max(round(fraction * _BAR), fraction > 0)).ljust(_BAR)
