"""One pass over the record batches of an annotated folder, to its data report."""

from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cappy.annotation.report.columns import Candidates, Codes, Flags, Ints, candidates, codes
from cappy.annotation.report.hashes import Hashes, RepetitionTotals, text_hash
from cappy.annotation.report.lengths import LengthTotals, num_characters, num_words
from cappy.annotation.report.pools import NUM_COLUMNS, measured, pools
from cappy.annotation.report.record import DataReport, Generator, Labels, Pools
from cappy.annotation.report.totals import NO_LABELS, LabelTotals, Totals
from cappy.annotation.rouge import partly_visible, visible
from cappy.records import prompt_hash
from cappy.records.folder import PART_ROWS
from cappy.records.instance import SOURCES

TEXTS = ("instruction", "reference", "response")


def summarize(batches: Iterable[pa.RecordBatch], metric: str) -> DataReport:
    """As `cappy.annotation.report.summarize` says."""
    summary = _Summary(metric)
    for batch in batches:
        for start in range(0, batch.num_rows, PART_ROWS):
            summary.add(batch.slice(start, PART_ROWS))
    return summary.report()


class _Summary:
    """What the rows so far add up to."""

    def __init__(self, metric: str) -> None:
        self._metric = metric
        self._pools: dict[str, Totals[str]] = {name: Totals(NUM_COLUMNS) for name in ("total", "split", "task")}
        self._labels = LabelTotals()
        self._statuses: Counter[str] = Counter()
        self._characters = {name: LengthTotals() for name in TEXTS}
        self._words = {name: LengthTotals() for name in TEXTS}
        self._instructions, self._groups = RepetitionTotals(), RepetitionTotals()
        self._empty = self._invisible = self._partly_invisible = 0

    def add(self, batch: pa.RecordBatch) -> None:
        """Takes a batch of a bounded number of rows in."""
        found = candidates(batch, self._metric)
        splits = codes(batch["split"], "train")
        self._add_pools(found, splits, codes(batch["task"]))
        self._add_responses(found)
        instructions = codes(batch["instruction"])
        self._add_texts("instruction", instructions)
        self._add_texts("reference", codes(batch["references"].flatten()))
        self._instructions.add(_hashes(instructions, prompt_hash), splits)
        self._groups.add(_hashes(_groups(batch), text_hash), splits)
        self._add_visibility(batch["references"].to_pylist(), found)

    def report(self) -> DataReport:
        """The report of the rows so far."""
        kinds = {name: sorted(found, key=_size) for name, found in self._named_pools().items()}
        return DataReport(
            metric=self._metric,
            total=dict(kinds["total"]).get("", pools([0] * NUM_COLUMNS)),
            splits=dict(kinds["split"]),
            tasks=dict(kinds["task"]),
            labels=self._every_label(),
            sources=self._sources(),
            generators=self._generators(),
            statuses=dict(sorted((+self._statuses).items(), key=lambda item: (-item[1], item[0]))),
            characters={name: totals.lengths() for name, totals in self._characters.items()},
            words={name: totals.lengths() for name, totals in self._words.items()},
            responses=self._words["response"].lengths().texts,
            empty=self._empty,
            groups=self._groups.repetition(),
            instructions=self._instructions.repetition(),
            invisible_to_rouge_l=self._invisible,
            partly_invisible_to_rouge_l=self._partly_invisible,
        )

    def _add_pools(self, found: Candidates, splits: Codes, tasks: Codes) -> None:
        rows = measured(found)
        self._pools["total"].add([""], np.zeros(len(rows), dtype=np.int64), rows)
        for name, column in (("split", splits), ("task", tasks)):
            self._pools[name].add(column.names(), column.index, rows)

    def _add_responses(self, found: Candidates) -> None:
        proposed, llm = found.proposed, found.source.among("llm")
        words = num_words(found.response.values)
        blank = words[found.response.index] == 0
        self._labels.add(found, blank)
        self._empty += int((blank & proposed).sum())
        times = _times(found.response, proposed)
        self._words["response"].add(words, times)
        self._characters["response"].add(num_characters(found.response.values), times)
        self._statuses.update(dict(zip(found.status.names(), _times(found.status, llm).tolist(), strict=True)))

    def _add_visibility(self, references: list[list[str] | None], found: Candidates) -> None:
        self._invisible += sum(not any(map(visible, texts or ())) for texts in references)
        partly = np.fromiter((any(map(partly_visible, texts or ())) for texts in references), dtype=np.bool_)
        texts = found.response.names()
        responses = np.fromiter(map(partly_visible, texts), dtype=np.bool_, count=len(texts))
        partly[found.owner[responses[found.response.index] & found.source.among("llm")]] = True
        self._partly_invisible += int(partly.sum())

    def _add_texts(self, name: str, texts: Codes) -> None:
        times = _times(texts)
        self._words[name].add(num_words(texts.values), times)
        self._characters[name].add(num_characters(texts.values), times)

    def _named_pools(self) -> dict[str, list[tuple[str, Pools]]]:
        return {kind: [(name, pools(sums)) for name, sums in t.items()] for kind, t in self._pools.items()}

    def _every_label(self) -> Labels:
        return self._labels.grouped(lambda key: "").get("", (NO_LABELS, 0))[0]

    def _sources(self) -> dict[str, Labels]:
        found = self._labels.grouped(lambda key: key[0])
        return {source: found[source][0] for source in SOURCES if source in found}

    def _generators(self) -> tuple[Generator, ...]:
        found = [
            Generator(generator=key[1], decoding=key[2], empty=empty, labels=labels)
            for key, (labels, empty) in self._labels.grouped(lambda key: key).items()
            if key[0] == "llm"
        ]
        return tuple(sorted(found, key=lambda generator: -generator.labels.count))


def _times(texts: Codes, wanted: Flags | None = None) -> Ints:
    """How often each distinct text stands there, or among the wanted entries."""
    index = texts.index if wanted is None else texts.index[wanted]
    return np.bincount(index, minlength=len(texts.values))


def _hashes(texts: Codes, hashed: Callable[[str], int]) -> Hashes:
    """The hash of each entry."""
    hashes = np.fromiter(map(hashed, texts.names()), dtype=np.uint64, count=len(texts.values))
    return hashes[texts.index]


def _groups(batch: pa.RecordBatch) -> Codes:
    """The group of each instance; one without is a group by itself, as `Instance` has it."""
    group = batch["group_id"].fill_null("")
    return codes(pc.if_else(pc.equal(group, ""), batch["instance_id"], group))


def _size(item: tuple[str, Pools]) -> tuple[int, str]:
    return -item[1].instances, item[0]
