"""Reads an annotated folder, writes its data report."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa

from cappy.annotation.report import page
from cappy.annotation.report.columns import COLUMNS, listed, metrics_of
from cappy.annotation.report.record import DataReport
from cappy.annotation.report.summary import summarize
from cappy.errors import ConfigError, RecordError
from cappy.progress import Progress
from cappy.records import Manifest, read_batches, read_manifest
from cappy.records.folder import write_bytes


def write_page(report: DataReport, folder: Path) -> None:
    """Writes `report.html`, one self-contained file, and `report.json`, all numbers."""
    text = json.dumps(report.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
    write_bytes(folder / "report.json", f"{text}\n".encode())
    write_bytes(folder / "report.html", page.render(report).encode())


def report_folder(folder: Path, target: Path, metric: str | None, progress: Progress) -> DataReport:
    """As `write_report` says."""
    manifest = read_manifest(folder)
    name = metric or _metric(folder, manifest)
    batches = _told(read_batches(folder, columns=COLUMNS), progress, manifest.rows)
    try:
        report = summarize(batches, name)
    except RecordError as error:
        raise RecordError(f"{folder}: {error}") from error
    write_page(report, target)
    return report


def _metric(folder: Path, manifest: Manifest) -> str:
    """The metric that the folder was annotated with."""
    named = manifest.config.get("metric") if manifest.step == "annotation" else None
    if isinstance(named, str):
        return named
    batch = next(read_batches(folder, columns=["candidates.list.element.labels"]), None)
    names = metrics_of(batch["candidates"].flatten().field("labels")) if batch is not None else []
    remedy = f"name one of {listed(names)}" if names else "it has no labels: run cappy annotation first"
    raise ConfigError(f"{folder}: its manifest names no metric (step {manifest.step or 'unknown'}); {remedy}")


def _told(batches: Iterable[pa.RecordBatch], progress: Progress, total: int) -> Iterator[pa.RecordBatch]:
    done = 0
    progress(done, total, unit="instances")
    for batch in batches:
        yield batch
        done += batch.num_rows
        progress(done, total, unit="instances")
