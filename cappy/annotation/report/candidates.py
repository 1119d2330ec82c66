"""Reads the candidates of an Arrow batch as arrays, and computes statistics of every instance.

Everything is vectorised. `measure_instances` returns one row of integers per instance; the rows can be summed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cappy.annotation.report.record import PoolStatistics
from cappy.errors import RecordError, quote
from cappy.records.instance import SELECTABLE

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

_CANDIDATE_COLUMNS = ("response", "source", "generator", "decoding", "status", "labels")
COLUMNS = (
    *("instance_id", "group_id", "task", "split", "instruction", "references"),
    *(f"candidates.list.element.{name}" for name in _CANDIDATE_COLUMNS),
)
"""The columns that the report reads from a folder, for `read_batches`."""
_MAX_NAMES = 8
SCALE = 2**40
"""Fractions are summed as integer multiples of 1 / SCALE, so that sums do not depend on the batches."""
_COUNTS = ("instances", "candidates", "selectable", "distinct", "num_pools", "num_multi_response_pools")
_POOL_MEANS = ("random", "oracle", "no_signal", "best_shared", "effective")
NUM_COLUMNS = len(_COUNTS) + len(_POOL_MEANS) + 1


@dataclass(frozen=True, slots=True)
class TextColumn:
    """A dictionary-encoded column: the distinct texts, and the index of the text of each entry."""

    values: pa.StringArray
    index: Ints

    def texts(self) -> list[str]:
        """The distinct texts."""
        distinct: list[str] = self.values.to_pylist()
        return distinct

    def is_in(self, *texts: str) -> Flags:
        """Whether each entry is one of these texts."""
        flags: Flags = np.asarray(pc.is_in(self.values, pa.array(texts, self.values.type)))[self.index]
        return flags


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """The candidates of a batch of `rows` instances, in order; `owner` is the instance's row of each, ascending."""

    rows: int
    owner: Ints
    labels: Floats
    response: TextColumn
    source: TextColumn
    generator: TextColumn
    decoding: TextColumn
    status: TextColumn

    @property
    def is_selectable(self) -> Flags:
        """Whether each candidate is selectable; see `Candidate.selectable`."""
        flags: Flags = self.is_proposal & self.status.is_in(*SELECTABLE)
        return flags

    @property
    def is_proposal(self) -> Flags:
        """Whether each candidate is an LLM's response or a choice, whatever its status."""
        return self.source.is_in("llm", "choice")


def encode_texts(column: pa.Array, default: str = "") -> TextColumn:
    """Dictionary-encodes a column; nulls become `default`."""
    encoded = column.fill_null(default).dictionary_encode()
    return TextColumn(encoded.dictionary, np.asarray(encoded.indices, dtype=np.int64))


def read_candidates(batch: pa.RecordBatch, metric: str) -> Candidates:
    """Reads the candidates of a batch. Raises RecordError if a label of this metric is missing or not from 0 to 1."""
    column = batch["candidates"]
    sizes = np.asarray(pc.list_value_length(column).fill_null(0), dtype=np.int64)
    entries = column.flatten()
    owner = np.repeat(np.arange(len(sizes)), sizes)
    labels, labelled = _read_labels(entries.field("labels"), metric)
    if not labelled.all():
        index = int(np.argmin(labelled))
        remedy = _missing_label_remedy(entries, index, metric)
        raise RecordError(f"{_describe_candidate(batch, owner, index)} has no label {quote(metric)}; {remedy}")
    wrong = ~((labels >= 0) & (labels <= 1))
    if wrong.any():
        index = int(np.argmax(wrong))
        remedy = "labels must be 0 to 1: run cappy annotation again"
        raise RecordError(
            f"{_describe_candidate(batch, owner, index)}: label {quote(metric)} is {labels[index]}; {remedy}"
        )
    return Candidates(
        rows=len(sizes),
        owner=owner,
        labels=labels,
        response=encode_texts(entries.field("response")),
        source=encode_texts(entries.field("source"), "llm"),
        generator=encode_texts(entries.field("generator")),
        decoding=encode_texts(entries.field("decoding")),
        status=encode_texts(entries.field("status"), "ok"),
    )


def metrics_of(labels: pa.MapArray) -> list[str]:
    """The names of the metrics in a column of labels, sorted."""
    first, last = (int(labels.offsets[end].as_py()) for end in (0, len(labels)))
    return sorted(pc.unique(labels.keys.slice(first, last - first)).to_pylist())


def _read_labels(maps: pa.MapArray, metric: str) -> tuple[Floats, Flags]:
    """The label of each candidate, and whether it has one that is not null."""
    offsets = np.asarray(maps.offsets, dtype=np.int64)
    keys = maps.keys.slice(offsets[0], offsets[-1] - offsets[0])
    values = maps.items.slice(offsets[0], offsets[-1] - offsets[0])
    positions = np.flatnonzero(np.asarray(pc.and_(pc.equal(keys, metric), values.is_valid())))
    candidate = np.searchsorted(offsets, positions + offsets[0], side="right") - 1
    labels, labelled = np.zeros(len(maps)), np.zeros(len(maps), dtype=np.bool_)
    labels[candidate] = np.asarray(values.take(pa.array(positions)))
    labelled[candidate] = True
    return labels, labelled


def _describe_candidate(batch: pa.RecordBatch, owner: Ints, index: int) -> str:
    row = int(owner[index])
    return f"instance {quote(batch['instance_id'][row].as_py())}: candidate {index - int(np.searchsorted(owner, row))}"


def _missing_label_remedy(entries: pa.StructArray, index: int, metric: str) -> str:
    """The remedy for a missing label: choose a metric that this candidate has, or annotate."""
    labels = entries.field("labels")
    own_metrics, all_metrics = (
        [name for name in metrics_of(part) if name != metric] for part in (labels.slice(index, 1), labels)
    )
    if own_metrics:
        return f"it has {list_names(own_metrics)}: choose one of them, or run cappy annotation with that metric"
    if metric in metrics_of(labels):
        return "other candidates have it: run cappy annotation again"
    available = f"other candidates have {list_names(all_metrics)}" if all_metrics else "no candidate has any label"
    return f"{available}: run cappy annotation"


def list_names(names: Iterable[str]) -> str:
    """At most eight names, for an error message."""
    listed = list(names)
    more = f" and {len(listed) - _MAX_NAMES} more" if len(listed) > _MAX_NAMES else ""
    return ", ".join(quote(name) for name in listed[:_MAX_NAMES]) + more


def to_fixed_point(values: Floats) -> Ints:
    """Values as integer multiples of 1 / SCALE, each rounded by at most 5e-13."""
    return np.rint(values * SCALE).astype(np.int64)


def measure_instances(candidates: Candidates) -> Ints:
    """Returns one row per instance, shape (instances, NUM_COLUMNS): _COUNTS, _POOL_MEANS and ties.

    The columns are fields of `PoolStatistics`; fractions are in fixed point (`to_fixed_point`).
    """
    selectable = candidates.is_selectable
    owner, labels, rows = candidates.owner[selectable], candidates.labels[selectable], candidates.rows
    first, counts = _find_distinct(owner, candidates.response.index[selectable], len(candidates.response.values))
    size, distinct = _count_per_row(owner, rows), _count_per_row(owner[first], rows)
    has_pool, has_several_responses = size > 0, distinct >= 2
    mean = np.bincount(owner, weights=labels, minlength=rows) / np.maximum(size, 1)
    highest, lowest = _reduce_per_row(np.maximum, labels, size), _reduce_per_row(np.minimum, labels, size)
    tied = _count_tied_pairs(owner[first], labels[first], rows) / np.maximum(distinct * (distinct - 1) // 2, 1)
    return np.column_stack(
        [
            np.ones(rows, dtype=np.int64),
            _count_per_row(candidates.owner, rows),
            size,
            distinct,
            has_pool,
            has_several_responses,
            to_fixed_point(mean),
            to_fixed_point(highest),
            to_fixed_point((has_pool & (highest == lowest)).astype(np.float64)),
            to_fixed_point(_find_ties_for_best(owner[first], labels[first], distinct).astype(np.float64)),
            to_fixed_point(_effective_sizes(owner[first], counts, size)),
            to_fixed_point(np.where(has_several_responses, tied, 0.0)),
        ]
    )


def to_pool_statistics(sums: list[int]) -> PoolStatistics:
    """Converts the sum of rows of `measure_instances` to counts and means."""
    counts = dict(zip(_COUNTS, sums, strict=False))
    totals = zip(_POOL_MEANS, sums[len(_COUNTS) :], strict=False)
    means = {name: mean_of_sum(total, counts["num_pools"]) for name, total in totals}
    values: dict[str, Any] = {**counts, **means, "ties": mean_of_sum(sums[-1], counts["num_multi_response_pools"])}
    return PoolStatistics(**values)


def mean_of_sum(total: int, count: int) -> float | None:
    """The mean of `count` fractions from their fixed-point sum; None if `count` is 0."""
    return total / (SCALE * count) if count else None


def _find_distinct(owner: Ints, text: Ints, num_texts: int) -> tuple[Ints, Ints]:
    """Index of the first occurrence of each text in its instance, ascending, and its number of occurrences."""
    _, first, counts = np.unique(owner * num_texts + text, return_index=True, return_counts=True)
    order = np.argsort(first)
    return first[order], counts[order]


def _count_per_row(owner: Ints, rows: int) -> Ints:
    return np.bincount(owner, minlength=rows)


def _reduce_per_row(extreme: np.ufunc, values: Floats, size: Ints) -> Floats:
    """Reduces the values of each instance with `extreme`; 0 for instances without values."""
    result = np.zeros(len(size))
    nonempty = size > 0
    if nonempty.any():
        result[nonempty] = extreme.reduceat(values, (np.cumsum(size) - size)[nonempty])
    return result


def _find_ties_for_best(owner: Ints, labels: Floats, distinct: Ints) -> Flags:
    """Whether several distinct responses of each instance have its highest label."""
    best = _reduce_per_row(np.maximum, labels, distinct)
    flags: Flags = _count_per_row(owner[labels == best[owner]], len(distinct)) >= 2
    return flags


def _count_tied_pairs(owner: Ints, labels: Floats, rows: int) -> Floats:
    """Number of pairs of distinct responses with equal labels, by instance."""
    order = np.lexsort((labels, owner))
    owner, labels = owner[order], labels[order]
    starts = np.flatnonzero(np.append(True, (owner[1:] != owner[:-1]) | (labels[1:] != labels[:-1]))[: len(owner)])
    run = np.diff(np.append(starts, len(owner)))
    pairs: Floats = np.bincount(owner[starts], weights=run * (run - 1) / 2, minlength=rows).astype(np.float64)
    return pairs


def _effective_sizes(owner: Ints, counts: Ints, size: Ints) -> Floats:
    """exp of the entropy of an instance's responses: n / exp(mean of log c), where c is the count of each response.

    Summed in the order of the instance's responses, so that the result does not depend on the batch.
    """
    log_sums = np.bincount(owner, weights=counts * np.log(counts), minlength=len(size))
    effective: Floats = size / np.exp(log_sums / np.maximum(size, 1))
    return effective
