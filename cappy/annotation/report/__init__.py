"""The data report: what a folder of annotated instances holds, and whether it lets selection matter.

`write_report(folder, target)` reads the folder once, in bounded memory, and writes report.html and report.json.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from cappy.annotation.report.record import DataReport
from cappy.progress import Progress, silent

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["DataReport", "summarize", "to_text", "write_page", "write_report"]


def summarize(batches: "Iterable[pa.RecordBatch]", metric: str) -> DataReport:
    """The data report of annotated instances, from record batches that have at least `columns.COLUMNS`.

    Memory grows with the number of tasks, of splits and of generators, and by 8 bytes per distinct instruction and
    group (three times that while hashes are merged); else it is that of 512 instances. Everything is exact but what
    `Lengths` and `Repetition` say of themselves, and the same however the rows are batched. RecordError where a
    candidate has no label of this metric, or a label outside 0 to 1; it names the instance.
    """
    from cappy.annotation.report import summary

    return summary.summarize(batches, metric)


def to_text(report: DataReport) -> str:
    """The findings and the tables as plain text of at most 100 columns; more than 40 tasks or generators are folded."""
    from cappy.annotation.report import text

    return text.to_text(report)


def write_page(report: DataReport, folder: Path) -> None:
    """Writes `report.html`, one self-contained file, and `report.json`, all numbers, into `folder`."""
    from cappy.annotation.report import write

    write.write_page(report, folder)


def write_report(folder: Path, target: Path, metric: str | None = None, progress: Progress = silent) -> DataReport:
    """The data report of a finished folder, written to `target` as report.html and report.json.

    The metric is the one that the folder was annotated with, if none is named. FolderError where the folder is
    unfinished or damaged, ConfigError where no metric is known, RecordError as `summarize`.
    """
    from cappy.annotation.report import write

    return write.report_folder(folder, target, metric, progress)
