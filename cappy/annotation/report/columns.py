"""The candidates of an Arrow batch side by side, as arrays: no loop over candidates."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cappy.errors import RecordError, shown
from cappy.records.instance import SELECTABLE

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

_OF_CANDIDATES = ("response", "source", "generator", "decoding", "status", "labels")
COLUMNS = (
    *("instance_id", "group_id", "task", "split", "instruction", "references"),
    *(f"candidates.list.element.{name}" for name in _OF_CANDIDATES),
)
"""What of a folder the report reads, as `read_batches` wants it."""
_MOST_NAMES = 8


@dataclass(frozen=True, slots=True)
class Codes:
    """A column of texts: the distinct ones, and which of them each entry is. A null is the default."""

    values: pa.StringArray
    index: Ints

    def names(self) -> list[str]:
        """The distinct texts."""
        found: list[str] = self.values.to_pylist()
        return found

    def among(self, *texts: str) -> Flags:
        """Which entries are one of these texts."""
        flags: Flags = np.asarray(pc.is_in(self.values, pa.array(texts, self.values.type)))[self.index]
        return flags


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """The candidates of a batch of `rows` instances, in order; `owner` is the row of each, ascending."""

    rows: int
    owner: Ints
    labels: Floats
    response: Codes
    source: Codes
    generator: Codes
    decoding: Codes
    status: Codes

    @property
    def selectable(self) -> Flags:
        """As `Candidate.selectable`."""
        flags: Flags = self.proposed & self.status.among(*SELECTABLE)
        return flags

    @property
    def proposed(self) -> Flags:
        """Whether it is an LLM's response or a choice, whatever its status."""
        return self.source.among("llm", "choice")


def codes(column: pa.Array, default: str = "") -> Codes:
    """The distinct texts of a column and where they stand."""
    encoded = column.fill_null(default).dictionary_encode()
    return Codes(encoded.dictionary, np.asarray(encoded.indices, dtype=np.int64))


def candidates(batch: pa.RecordBatch, metric: str) -> Candidates:
    """The candidates with their labels; RecordError for the first that has none of this metric, or none of 0 to 1."""
    column = batch["candidates"]
    sizes = np.asarray(pc.list_value_length(column).fill_null(0), dtype=np.int64)
    entries = column.flatten()
    owner = np.repeat(np.arange(len(sizes)), sizes)
    labels, labelled = _labels(entries.field("labels"), metric)
    if not labelled.all():
        at = int(np.argmin(labelled))
        raise RecordError(f"{_place(batch, owner, at)} has no label {shown(metric)}; {_remedy(entries, at, metric)}")
    wrong = ~((labels >= 0) & (labels <= 1))
    if wrong.any():
        at = int(np.argmax(wrong))
        remedy = "labels are 0 to 1: run cappy annotation again"
        raise RecordError(f"{_place(batch, owner, at)}: label {shown(metric)} is {labels[at]}; {remedy}")
    return Candidates(
        rows=len(sizes),
        owner=owner,
        labels=labels,
        response=codes(entries.field("response")),
        source=codes(entries.field("source"), "llm"),
        generator=codes(entries.field("generator")),
        decoding=codes(entries.field("decoding")),
        status=codes(entries.field("status"), "ok"),
    )


def metrics_of(labels: pa.MapArray) -> list[str]:
    """The metrics that a column of labels names, sorted."""
    first, last = (int(labels.offsets[end].as_py()) for end in (0, len(labels)))
    return sorted(pc.unique(labels.keys.slice(first, last - first)).to_pylist())


def _labels(maps: pa.MapArray, metric: str) -> tuple[Floats, Flags]:
    """The label of each candidate, and whether it has one that is not null."""
    offsets = np.asarray(maps.offsets, dtype=np.int64)
    keys = maps.keys.slice(offsets[0], offsets[-1] - offsets[0])
    values = maps.items.slice(offsets[0], offsets[-1] - offsets[0])
    at = np.flatnonzero(np.asarray(pc.and_(pc.equal(keys, metric), values.is_valid())))
    holder = np.searchsorted(offsets, at + offsets[0], side="right") - 1
    labels, labelled = np.zeros(len(maps)), np.zeros(len(maps), dtype=np.bool_)
    labels[holder] = np.asarray(values.take(pa.array(at)))
    labelled[holder] = True
    return labels, labelled


def _place(batch: pa.RecordBatch, owner: Ints, at: int) -> str:
    row = int(owner[at])
    return f"instance {shown(batch['instance_id'][row].as_py())}: candidate {at - int(np.searchsorted(owner, row))}"


def _remedy(entries: pa.StructArray, at: int, metric: str) -> str:
    """What to do about a missing label: to name a metric that this candidate has, or to annotate."""
    labels = entries.field("labels")
    own, every = ([name for name in metrics_of(part) if name != metric] for part in (labels.slice(at, 1), labels))
    if own:
        return f"it has {listed(own)}: name one of them, or run cappy annotation with that metric"
    if metric in metrics_of(labels):
        return "others have it: run cappy annotation again"
    others = f"others have {listed(every)}" if every else "no candidate has one"
    return f"{others}: run cappy annotation"


def listed(names: Iterable[str]) -> str:
    """Names for an error's line, at most eight of them."""
    every = list(names)
    more = f" and {len(every) - _MOST_NAMES} more" if len(every) > _MOST_NAMES else ""
    return ", ".join(shown(name) for name in every[:_MOST_NAMES]) + more
