"""Summarises the record batches of an annotated folder in one pass.

All sums are of integers, so the result does not depend on the order of the rows or on the batches.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cappy.annotation.report.candidates import (
    NUM_COLUMNS,
    Candidates,
    Flags,
    Floats,
    Ints,
    TextColumn,
    encode_texts,
    mean_of_sum,
    measure_instances,
    read_candidates,
    to_fixed_point,
    to_pool_statistics,
)
from cappy.annotation.report.record import (
    NUM_BINS,
    QUANTILES,
    DataReport,
    GeneratorSummary,
    Labels,
    LengthSummary,
    PoolStatistics,
    Repetition,
)
from cappy.annotation.rouge import is_partly_visible, is_visible
from cappy.records import prompt_hash
from cappy.records.folder import PART_ROWS
from cappy.records.instance import SOURCES

Hashes = npt.NDArray[np.uint64]
K = TypeVar("K", str, tuple[str, str], tuple[str, str, str])
_Key = tuple[str, str, str]
"""(source, generator, decoding) of candidates."""
_NUM_BIN_COUNTS = NUM_BINS + 2
"""Cells of a histogram of labels: exactly 0, the bins, exactly 1."""

_NO_LABELS = Labels(zero=0, bins=(0,) * NUM_BINS, one=0, mean=None)
_TEXTS = ("instruction", "reference", "response")
_MIN_PENDING = 2**12
"""Minimum number of hashes to collect before they are merged."""
_KEPT_BITS = 11
"""Number of leading bits that select the histogram cell of a length; lengths up to 2,047 have their own cell."""
_IS_SPACE = np.zeros(256, dtype=np.bool_)
_IS_SPACE[[*b" \t\n\v\f\r\x1c\x1d\x1e\x1f"]] = True


def summarize(batches: Iterable[pa.RecordBatch], metric: str) -> DataReport:
    """The data report of annotated instances, from record batches with at least the columns `candidates.COLUMNS`.

    Memory grows with the number of tasks, splits and generators, and by 8 bytes per distinct instruction and group
    (three counts that while hashes are merged); apart from that, 512 instances at a time are in memory. The result does
    not depend on how the rows are divided into batches, and is exact except as documented in `LengthSummary` and
    `Repetition`. Raises RecordError, naming the instance, if a candidate has no label of this metric, or a label
    outside 0 to 1.
    """
    summary = _Summary(metric)
    for batch in batches:
        for start in range(0, batch.num_rows, PART_ROWS):
            summary.add(batch.slice(start, PART_ROWS))
    return summary.report()


class _Summary:
    """Accumulates the statistics of batches of instances."""

    def __init__(self, metric: str) -> None:
        self._metric = metric
        self._pools: dict[str, Totals[str]] = {name: Totals(NUM_COLUMNS) for name in ("total", "split", "task")}
        self._labels = LabelTotals()
        self._statuses: Counter[str] = Counter()
        self._characters = {name: LengthTotals() for name in _TEXTS}
        self._words = {name: LengthTotals() for name in _TEXTS}
        self._instructions, self._groups = RepetitionTotals(), RepetitionTotals()
        self._num_blank = self._invisible = self._partly_invisible = 0

    def add(self, batch: pa.RecordBatch) -> None:
        """Adds a batch; the caller limits its number of rows."""
        candidates = read_candidates(batch, self._metric)
        splits = encode_texts(batch["split"], "train")
        self._add_pools(candidates, splits, encode_texts(batch["task"]))
        self._add_responses(candidates)
        instructions = encode_texts(batch["instruction"])
        self._add_texts("instruction", instructions)
        self._add_texts("reference", encode_texts(batch["references"].flatten()))
        self._instructions.add(_hash_texts(instructions, prompt_hash), splits)
        self._groups.add(_hash_texts(_read_groups(batch), _hash_text), splits)
        self._add_visibility(batch["references"].to_pylist(), candidates)

    def report(self) -> DataReport:
        """The data report of the batches added so far."""
        kinds = {kind: sorted(named_pools, key=_largest_first) for kind, named_pools in self._named_pools().items()}
        return DataReport(
            metric=self._metric,
            total=dict(kinds["total"]).get("", to_pool_statistics([0] * NUM_COLUMNS)),
            splits=dict(kinds["split"]),
            tasks=dict(kinds["task"]),
            labels=self._all_labels(),
            sources=self._sources(),
            generators=self._generators(),
            statuses=dict(sorted((+self._statuses).items(), key=lambda item: (-item[1], item[0]))),
            characters={name: totals.lengths() for name, totals in self._characters.items()},
            words={name: totals.lengths() for name, totals in self._words.items()},
            responses=self._words["response"].lengths().num_texts,
            num_blank=self._num_blank,
            groups=self._groups.repetition(),
            instructions=self._instructions.repetition(),
            invisible_to_rouge_l=self._invisible,
            partly_invisible_to_rouge_l=self._partly_invisible,
        )

    def _add_pools(self, candidates: Candidates, splits: TextColumn, tasks: TextColumn) -> None:
        rows = measure_instances(candidates)
        self._pools["total"].add([""], np.zeros(len(rows), dtype=np.int64), rows)
        for name, column in (("split", splits), ("task", tasks)):
            self._pools[name].add(column.texts(), column.index, rows)

    def _add_responses(self, candidates: Candidates) -> None:
        is_proposal, is_llm = candidates.is_proposal, candidates.source.is_in("llm")
        words = count_words(candidates.response.values)
        blank = words[candidates.response.index] == 0
        self._labels.add(candidates, blank)
        self._num_blank += int((blank & is_proposal).sum())
        counts = _count_occurrences(candidates.response, is_proposal)
        self._words["response"].add(words, counts)
        self._characters["response"].add(count_characters(candidates.response.values), counts)
        self._statuses.update(
            dict(zip(candidates.status.texts(), _count_occurrences(candidates.status, is_llm).tolist(), strict=True))
        )

    def _add_visibility(self, references: list[list[str] | None], candidates: Candidates) -> None:
        self._invisible += sum(not any(map(is_visible, texts or ())) for texts in references)
        partly = np.fromiter((any(map(is_partly_visible, texts or ())) for texts in references), dtype=np.bool_)
        texts = candidates.response.texts()
        responses = np.fromiter(map(is_partly_visible, texts), dtype=np.bool_, count=len(texts))
        partly[candidates.owner[responses[candidates.response.index] & candidates.source.is_in("llm")]] = True
        self._partly_invisible += int(partly.sum())

    def _add_texts(self, name: str, texts: TextColumn) -> None:
        counts = _count_occurrences(texts)
        self._words[name].add(count_words(texts.values), counts)
        self._characters[name].add(count_characters(texts.values), counts)

    def _named_pools(self) -> dict[str, list[tuple[str, PoolStatistics]]]:
        return {kind: [(name, to_pool_statistics(sums)) for name, sums in t.items()] for kind, t in self._pools.items()}

    def _all_labels(self) -> Labels:
        return self._labels.group_by(lambda key: "").get("", (_NO_LABELS, 0))[0]

    def _sources(self) -> dict[str, Labels]:
        labels = self._labels.group_by(lambda key: key[0])
        return {source: labels[source][0] for source in SOURCES if source in labels}

    def _generators(self) -> tuple[GeneratorSummary, ...]:
        generators = [
            GeneratorSummary(generator=key[1], decoding=key[2], num_blank=num_blank, labels=labels)
            for key, (labels, num_blank) in self._labels.group_by(lambda key: key).items()
            if key[0] == "llm"
        ]
        return tuple(sorted(generators, key=lambda generator: -generator.labels.count))


def _count_occurrences(texts: TextColumn, selected: Flags | None = None) -> Ints:
    """Number of occurrences of each distinct text, in all entries or in the selected ones."""
    index = texts.index if selected is None else texts.index[selected]
    return np.bincount(index, minlength=len(texts.values))


def _hash_texts(texts: TextColumn, hash_text: Callable[[str], int]) -> Hashes:
    """The hash of the text of each entry."""
    hashes = np.fromiter(map(hash_text, texts.texts()), dtype=np.uint64, count=len(texts.values))
    return hashes[texts.index]


def _read_groups(batch: pa.RecordBatch) -> TextColumn:
    """The group of each instance; an instance without one is its own group, as in `Instance`."""
    group = batch["group_id"].fill_null("")
    return encode_texts(pc.if_else(pc.equal(group, ""), batch["instance_id"], group))


def _largest_first(item: tuple[str, PoolStatistics]) -> tuple[int, str]:
    return -item[1].instances, item[0]


class Totals(Generic[K]):
    """Sums of rows of `width` integers, by name."""

    def __init__(self, width: int) -> None:
        self._sums: defaultdict[K, list[int]] = defaultdict(lambda: [0] * width)

    def add(self, names: list[K], index: Ints, rows: Ints) -> None:
        """Adds each row to the sums of its name, `names[index[i]]` for row i."""
        if not len(rows):
            return
        order = np.argsort(index, kind="stable")
        starts = np.flatnonzero(np.append(True, np.diff(index[order]) != 0))
        for name, sums in zip(
            index[order][starts].tolist(), np.add.reduceat(rows[order], starts).tolist(), strict=True
        ):
            self.add_row(names[name], sums)

    def add_row(self, name: K, sums: list[int]) -> None:
        """Adds one row to the sums of a name."""
        total = self._sums[name]
        total[:] = map(int.__add__, total, sums)

    def items(self) -> list[tuple[K, list[int]]]:
        """(name, sums), sorted by name."""
        return sorted(self._sums.items())


class LabelTotals:
    """Sums of labels and counts of blank responses by (source, generator, decoding)."""

    def __init__(self) -> None:
        self._totals: Totals[_Key] = Totals(_NUM_BIN_COUNTS + 2)

    def add(self, candidates: Candidates, blank: Flags) -> None:
        """Adds the candidates; `blank` marks responses without words."""
        columns = (candidates.source, candidates.generator, candidates.decoding)
        shape = tuple(max(len(column.values), 1) for column in columns)
        combined = np.ravel_multi_index(tuple(column.index for column in columns), shape)
        distinct, index = np.unique(combined, return_inverse=True)
        names = [column.texts() for column in columns]
        keys = [
            (names[0][source], names[1][generator], names[2][decoding])
            for source, generator, decoding in zip(*np.unravel_index(distinct, shape), strict=True)
        ]
        bins = index * _NUM_BIN_COUNTS + _bin_indices(candidates.labels)
        counts = np.bincount(bins, minlength=len(keys) * _NUM_BIN_COUNTS)
        sums = np.zeros((len(keys), 2), dtype=np.int64)
        np.add.at(sums[:, 0], index, to_fixed_point(candidates.labels))
        np.add.at(sums[:, 1], index, blank)
        self._totals.add(keys, np.arange(len(keys)), np.hstack([counts.reshape(-1, _NUM_BIN_COUNTS), sums]))

    def group_by(self, group: Callable[[_Key], K]) -> dict[K, tuple[Labels, int]]:
        """Sums labels and blank responses over all keys for which `group` returns the same value."""
        sums: Totals[K] = Totals(_NUM_BIN_COUNTS + 2)
        for key, row in self._totals.items():
            sums.add_row(group(key), row)
        return {name: (_to_labels(row), row[-1]) for name, row in sums.items()}


def _to_labels(sums: list[int]) -> Labels:
    zero, *bins, one = sums[:_NUM_BIN_COUNTS]
    return Labels(zero=zero, bins=tuple(bins), one=one, mean=mean_of_sum(sums[-2], sum(sums[:_NUM_BIN_COUNTS])))


def _bin_indices(labels: Floats) -> Ints:
    """The index of each label in `Labels.bin_counts`: 0 if it is 0, the last if it is 1, else 1 + its bin."""
    inside = 1 + np.minimum((labels * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    return np.where(labels == 0, 0, np.where(labels == 1, _NUM_BIN_COUNTS - 1, inside))


class LengthTotals:
    """A histogram of lengths, exact up to 2,047 with wider cells above, and the maximum length."""

    def __init__(self) -> None:
        self._cells = np.zeros(2 << _KEPT_BITS, dtype=np.int64)
        self._longest = 0

    def add(self, lengths: Ints, counts: Ints) -> None:
        """Counts each length as often as `counts` says."""
        lengths, counts = lengths[counts > 0], counts[counts > 0]
        if not len(lengths):
            return
        self._longest = max(self._longest, int(lengths.max()))
        # The number of trailing bits that are dropped: none if the length has at most 11 bits.
        dropped = np.maximum(np.frexp(lengths)[1] - _KEPT_BITS, 0)
        index = (dropped << (_KEPT_BITS - 1)) + (lengths >> dropped)
        if index.max() >= len(self._cells):
            self._cells = np.append(self._cells, np.zeros(index.max() + 1 - len(self._cells), dtype=np.int64))
        np.add.at(self._cells, index, counts)

    def lengths(self) -> LengthSummary:
        """The quantiles of the lengths added so far; no quantiles without texts."""
        ranks = np.cumsum(self._cells)
        num_texts = int(ranks[-1])
        if not num_texts:
            return LengthSummary(num_texts=0, quantiles={})
        target_ranks = [-(-num_texts * quantile // 100) for quantile in QUANTILES]
        lengths = map(_shortest_in_cell, np.searchsorted(ranks, target_ranks).tolist())
        quantiles = {str(quantile): length for quantile, length in zip(QUANTILES, lengths, strict=True)}
        return LengthSummary(num_texts=num_texts, quantiles={**quantiles, "max": self._longest})


def _shortest_in_cell(index: int) -> int:
    """The shortest length that is counted in a cell."""
    dropped = max((index >> (_KEPT_BITS - 1)) - 1, 0)
    return (index - (dropped << (_KEPT_BITS - 1))) << dropped


def count_characters(texts: pa.StringArray) -> Ints:
    """Number of Unicode characters of each text."""
    return np.asarray(pc.utf8_length(texts), dtype=np.int64)


def count_words(texts: pa.StringArray) -> Ints:
    """Number of words of each text, as split by `str.split`; `texts` must not have nulls."""
    counts = np.zeros(len(texts), dtype=np.int64)
    ascii_mask = pc.string_is_ascii(texts)
    is_ascii = np.asarray(ascii_mask)
    counts[is_ascii] = _count_ascii_words(texts.filter(ascii_mask))
    rest = pc.utf8_trim_whitespace(texts.filter(pc.invert(ascii_mask)))
    split = np.asarray(pc.list_value_length(pc.utf8_split_whitespace(rest)), dtype=np.int64)
    counts[~is_ascii] = np.where(np.asarray(pc.equal(rest, "")), 0, split)
    return counts


def _count_ascii_words(texts: pa.StringArray) -> Ints:
    """Number of words of ASCII texts, counted on their bytes: ten counts as fast as splitting."""
    _, offset_bytes, data = texts.buffers()
    offsets: npt.NDArray[np.int32] = np.frombuffer(offset_bytes, dtype=np.int32)[texts.offset :][: len(texts) + 1]
    if data is None or not len(texts):
        return np.zeros(len(texts), dtype=np.int64)
    space = _IS_SPACE[np.frombuffer(data, dtype=np.uint8)[: offsets[-1]]]
    is_word_start = ~space
    is_word_start[1:] &= space[:-1]
    first = offsets[:-1][offsets[:-1] < offsets[1:]]
    is_word_start[first] = ~space[first]
    return np.diff(np.searchsorted(np.flatnonzero(is_word_start), offsets))


def _hash_text(text: str) -> int:
    """A 64-bit hash of a text, without normalisation."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


class DistinctHashes:
    """Collects hashes and keeps them sorted and distinct; added hashes are merged once enough are pending."""

    def __init__(self) -> None:
        self._merged: Hashes = np.zeros(0, dtype=np.uint64)
        self._pending: list[Hashes] = []
        self._num_pending = 0

    def add(self, hashes: Hashes) -> None:
        """Adds hashes, which may repeat."""
        self._pending.append(np.unique(hashes))
        self._num_pending += len(self._pending[-1])
        if self._num_pending > max(len(self._merged), _MIN_PENDING):
            self._merge()

    def hashes(self) -> Hashes:
        """All distinct hashes, sorted."""
        self._merge()
        return self._merged

    def _merge(self) -> None:
        if self._pending:
            self._merged = np.unique(np.concatenate([self._merged, *self._pending]))
            self._pending, self._num_pending = [], 0


class RepetitionTotals:
    """Counts values, distinct values, and values that occur in several splits."""

    def __init__(self) -> None:
        self._values = 0
        self._splits: dict[str, DistinctHashes] = {}

    def add(self, hashes: Hashes, splits: TextColumn) -> None:
        """Adds the hash of each instance's value, with its split."""
        self._values += len(hashes)
        for code, name in enumerate(splits.texts()):
            self._splits.setdefault(name, DistinctHashes()).add(hashes[splits.index == code])

    def repetition(self) -> Repetition:
        """The counts of the values added so far."""
        hashes = [distinct.hashes() for distinct in self._splits.values()]
        _, counts = np.unique(np.concatenate(hashes or [np.zeros(0, np.uint64)]), return_counts=True)
        return Repetition(values=self._values, distinct=len(counts), in_several_splits=int((counts > 1).sum()))
