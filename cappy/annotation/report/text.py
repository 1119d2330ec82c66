"""The data report in words and tables: the findings, and the text for a terminal.

The text has at most 100 columns and no colours, the same when piped. The page shows the same findings and tables.
"""

import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from pydantic import TypeAdapter
from rich.cells import cell_len, set_cell_size

from cappy.annotation.report.record import NUM_BINS, QUANTILES, DataReport, Labels, Lengths, Pools
from cappy.pages.words import metric_name, percent
from cappy.records.instance import SELECTABLE
from cappy.untrusted import JSON

Row = tuple[str, ...]
Rows = list[Row]

WIDTH = 100
MOST_ROWS = 40
"""Rows of tasks and of generators; the rest is counted in a line."""
_NARROWEST_NAME = 8
_BAR = 30
_NOTHING = "–"
"""A number that there is not."""
DEFINITIONS: Mapping[str, str] = {
    "selectable": "an LLM's response or a choice, with status ok or truncated: what a selector may pick",
    "random, oracle, headroom": "mean label ×100 of a random and of the best selectable response, and their difference",
    "no signal": "instances whose selectable responses all have equal labels: whichever is picked, nothing changes",
    "ties": "pairs of different selectable responses of an instance with equal labels, mean over instances",
    "tied best": "instances whose best label several different selectable responses have",
    "effective": "as many equally frequent responses would vary as much (exp of the entropy), mean over instances",
    "blank": "responses without a word, whatever their status",
    "length": "characters of Unicode, and words between white space; a response is an LLM's or a choice",
}
"""What the columns mean. Shares and means are over the instances that have a selectable response."""


def to_text(report: DataReport) -> str:
    """The findings and the tables; names are cut where they are too long, and made harmless where they are odd."""
    parts = ["\n".join(_wrap_findings(report)), *(_format_tables(report) if report.total.instances else ())]
    return "\n\n".join(parts) + "\n"


def to_values(report: DataReport) -> dict[str, JSON]:
    """JSON values, with the findings in words beside the numbers."""
    values: dict[str, JSON] = TypeAdapter(DataReport).dump_python(report, mode="json")
    return {"findings": list(describe_findings(report)), **values}


def describe_findings(report: DataReport) -> tuple[str, ...]:
    """Sentences, the headline first; what a person should mend begins with "Caution"."""
    return (
        _headline(report),
        *_size_sentence(report),
        *_signal_sentences(report),
        *_variety_sentence(report),
        *_cautions(report),
    )


def _headline(report: DataReport) -> str:
    total = report.total
    if not total.instances:
        return "There are no instances."
    if total.random is None or total.oracle is None:
        return "There is nothing to select from: no instance has an LLM's response or a choice."
    if report.all_tied:
        return "Selection cannot matter here: all responses of an instance have the same label."
    return (
        f"A random response is worth {_format_label(total.random)} {metric_name(report.metric)} ×100, the best of its "
        f"instance {_format_label(total.oracle)}: selection can gain up to {_format_label(total.oracle - total.random)}."
    )


def _size_sentence(report: DataReport) -> Iterator[str]:
    total, groups = report.total, report.groups
    if total.instances:
        yield (
            f"{_format_noun(total.instances, 'instance')} of {_format_noun(groups.distinct, 'group')} in "
            f"{_format_noun(len(report.splits), 'split')} and {_format_noun(len(report.tasks), 'task')}, with "
            f"{_format_noun(total.candidates, 'candidate')}, {_format_count(total.selectable)} of them selectable."
        )


def _signal_sentences(report: DataReport) -> Iterator[str]:
    total = report.total
    if not total.pools:
        return
    pools = "instances" if total.pools == total.instances else "instances with a selectable response"
    if total.no_signal:
        silent = _format_share(total.no_signal)
        yield f"{silent} of the {pools} carry no signal: all their selectable responses have equal labels."
    else:
        yield f"All {pools} carry a signal: their selectable responses have different labels."
    if total.comparable:
        yield (
            f"Two different responses of an instance have equal labels in {_format_share(total.ties)} of the pairs; in "
            f"{_format_share(total.best_shared)} of the instances several different responses share the best label."
        )


def _variety_sentence(report: DataReport) -> Iterator[str]:
    total = report.total
    if total.pools:
        yield (
            f"An instance has {_format_mean(total.selectable / total.pools)} selectable responses, "
            f"{_format_mean(total.distinct / total.pools)} of them different; they vary as much as "
            f"{_format_mean(total.effective)} equally frequent ones would."
        )


def _cautions(report: DataReport) -> Iterator[str]:
    total, instructions, groups = report.total, report.instructions, report.groups
    if total.pools and total.pools < total.instances:
        empty_handed = _format_ratio(total.instances - total.pools, total.instances, "instance", "has", "have")
        yield f"Caution: {empty_handed} no selectable response."
    if report.empty:
        yield f"Caution: {_format_ratio(report.empty, report.responses, 'response', 'is', 'are')} blank."
    for status, some in report.statuses.items():
        # What has the status empty is blank, and that has been said.
        if status not in ("ok", "empty"):
            responses = _format_ratio(some, sum(report.statuses.values()), "LLM response", "has", "have")
            verdict = "which a selector may pick" if status in SELECTABLE else "so that no selector may pick it"
            yield f"Caution: {responses} the status {status}, {verdict}."
    if instructions.in_several_splits:
        shared = _format_ratio(instructions.in_several_splits, instructions.distinct, "instruction", "stands", "stand")
        yield f"Caution: {shared} in more than one split: what is trained on one is tested on the other."
    if groups.in_several_splits:
        shared = _format_ratio(groups.in_several_splits, groups.distinct, "group", "stands", "stand")
        yield f"Caution: {shared} in more than one split: splits must go by group."
    remedy = "annotate with rougeL_unicode or chrf"
    if report.invisible_to_rouge_l and report.by_rouge_l:
        unseen = _format_ratio(report.invisible_to_rouge_l, total.instances, "instance", "has", "have")
        yield f"Caution: {unseen} no reference that Rouge-L can see, which is [a-z0-9] alone; {remedy}."
    if report.partly_invisible_to_rouge_l and report.by_rouge_l:
        partly = _format_ratio(report.partly_invisible_to_rouge_l, total.instances, "instance", "has", "have")
        yield f"Caution: {partly} a reference or response of which Rouge-L sees only a part; {remedy}."


def _format_ratio(some: int, of: int, noun: str, singular: str, plural: str) -> str:
    """Such as "1 of 20 responses (5.0%) is"."""
    return f"{_format_count(some)} of {_format_noun(of, noun)} ({_format_part(some, of)}) {singular if some == 1 else plural}"


def _format_noun(some: int, noun: str) -> str:
    return f"{_format_count(some)} {noun if some == 1 else f'{noun}s'}"


def build_tables(report: DataReport) -> dict[str, Rows]:
    """Rows of texts by the name of the table, the header first."""
    return {
        "splits": _split_table(report),
        "tasks": _task_table(report),
        "sources": _source_table(report),
        "generators": _generator_table(report),
        "lengths": _length_table(report),
        "repetition": _repetition_table(report),
    }


def _split_table(report: DataReport) -> Rows:
    """Each split and all of them: sizes, what selection can gain."""
    header = (
        "split",
        "instances",
        "candidates",
        "selectable",
        "random",
        "oracle",
        "headroom",
        "no\nsignal",
        "effective",
    )

    def row(name: str, pools: Pools) -> Row:
        headroom = None if pools.oracle is None or pools.random is None else pools.oracle - pools.random
        return (
            name,
            *map(_format_count, (pools.instances, pools.candidates, pools.selectable)),
            *map(_format_label, (pools.random, pools.oracle, headroom)),
            _format_share(pools.no_signal),
            _format_mean(pools.effective),
        )

    return [header, *(row(name, pools) for name, pools in report.splits.items()), row("all", report.total)]


def _task_table(report: DataReport) -> Rows:
    """Each task: its size, its labels, its ties."""
    header = ("task", "instances", "candidates", "random", "oracle", "no\nsignal", "ties", "tied\nbest", "effective")

    def row(name: str, pools: Pools) -> Row:
        return (
            name or "(no task)",
            *map(_format_count, (pools.instances, pools.candidates)),
            *map(_format_label, (pools.random, pools.oracle)),
            *map(_format_share, (pools.no_signal, pools.ties, pools.best_shared)),
            _format_mean(pools.effective),
        )

    return [header, *(row(name, pools) for name, pools in report.tasks.items())]


def _source_table(report: DataReport) -> Rows:
    """Where candidates come from, and their labels."""
    return [
        ("source", "candidates", "mean", "exactly\n0", "exactly\n1"),
        *((name, *_label_cells(labels)) for name, labels in report.sources.items()),
    ]


def _generator_table(report: DataReport) -> Rows:
    """Each LLM with each of its ways of decoding, and the labels of its responses."""
    return [
        ("generator and decoding", "responses", "mean", "exactly\n0", "exactly\n1", "blank"),
        *((g.name, *_label_cells(g.labels), _format_part(g.empty, g.labels.count)) for g in report.generators),
    ]


def _length_table(report: DataReport) -> Rows:
    """How long instructions, references and responses are."""

    def row(name: str, lengths: Lengths) -> Row:
        return (
            name,
            _format_count(lengths.texts),
            *(_format_count(lengths.quantiles.get(key)) for key in (*map(str, QUANTILES), "max")),
        )

    return [
        ("length", "texts", "5%", "25%", "median", "75%", "95%", "99%", "longest"),
        *(row(f"{name}, words", held) for name, held in report.words.items()),
        *(row(f"{name}, characters", held) for name, held in report.characters.items()),
    ]


def _repetition_table(report: DataReport) -> Rows:
    """What stands there more than once."""
    total, instructions = report.total, report.instructions

    def row(name: str, some: int, of: int) -> Row:
        return (name, _format_count(some), _format_part(some, of))

    return [
        ("repetition", "count", "share"),
        row("responses that repeat one of their instance", total.selectable - total.distinct, total.selectable),
        row("instructions that repeat another one", instructions.repeats, instructions.values),
        row("instructions in more than one split", instructions.in_several_splits, instructions.distinct),
    ]


def _histogram_table(report: DataReport, bar: Callable[[float], str]) -> Rows:
    """Labels by source, and bars over what a selector chooses among; `bar` draws a fraction of the longest.

    Where no label lies between 0 and 1, all bins are one row.
    """
    names, columns = _cell_names(), [labels.cells for labels in report.sources.values()]
    if not any(report.labels.bins):
        names, columns = [names[0], "between", names[-1]], [(cells[0], 0, cells[-1]) for cells in columns]
    chosen = selectable_sources(report)
    sums = [sum(c[at] for c, s in zip(columns, report.sources, strict=True) if s in chosen) for at in range(len(names))]
    most = max(sums) or 1
    return [
        ("label", *report.sources, " and ".join(chosen) or "nothing selectable"),
        *(
            (name, *(_format_count(cells[at]) for cells in columns), bar(sums[at] / most))
            for at, name in enumerate(names)
        ),
    ]


def selectable_sources(report: DataReport) -> list[str]:
    """The sources, of those that there are, whose candidates a selector may pick."""
    return [source for source in report.sources if source in ("choice", "llm")]


def _cell_names() -> list[str]:
    """What each of `Labels.cells` counts."""
    edges = [f"{index / NUM_BINS:.2f}" for index in range(NUM_BINS + 1)]
    return ["exactly 0", *(f"{low} to {high}" for low, high in pairwise(edges)), "exactly 1"]


def _label_cells(labels: Labels) -> Row:
    zero, one = (_format_part(some, labels.count) for some in (labels.zero, labels.one))
    return (_format_count(labels.count), _format_label(labels.mean), zero, one)


def _format_label(value: float | None) -> str:
    """A label of 0 to 1, x 100."""
    return _NOTHING if value is None else percent(value)


def _format_share(value: float | None) -> str:
    """A share of 0 to 1 in percent, its sign beside it; what is not quite none or all does not read as such."""
    if value is None:
        return _NOTHING
    if 0 < value < 0.0005:
        return "<0.1%"
    return ">99.9%" if 0.9995 < value < 1 else f"{100 * value:.1f}%"


def _format_part(some: int, of: int) -> str:
    """`share` of two counts."""
    return _format_share(some / of if of else None)


def _format_mean(value: float | None) -> str:
    """A mean that is not a share, such as responses per instance."""
    return _NOTHING if value is None else f"{value:,.1f}"


def _format_count(value: int | None) -> str:
    """A count, by thousands."""
    return _NOTHING if value is None else f"{value:,}"


def _format_table(rows: Sequence[Row]) -> str:
    """Rows under one another, the header first: names to the left, numbers to the right, within `WIDTH` cells.

    Lines of a header's cell stand under one another.
    """
    header = [cell.split("\n") for cell in rows[0]]
    height = max(map(len, header))
    stacked = [tuple(([""] * (height - len(cell)) + cell)[line] for cell in header) for line in range(height)]
    every = [*stacked, *rows[1:]]
    widths = [max(cell_len(row[column]) for row in every) for column in range(1, len(header))]
    width = max(WIDTH - sum(widths) - 2 * len(widths), _NARROWEST_NAME)
    names = [_shorten(row[0], width) for row in every]
    first = max(map(cell_len, names))
    lines = (
        [name + " " * (first - cell_len(name)), *(f"{cell:>{w}}" for cell, w in zip(row[1:], widths, strict=True))]
        for name, row in zip(names, every, strict=True)
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _shorten(name: str, width: int) -> str:
    """A name in one line, its middle left out where it is wider than `width` cells."""
    line = _printable(name)
    if cell_len(line) <= width:
        return line
    tail = (width - 1) // 2
    end = line[-tail:]
    while cell_len(end) > tail:
        end = end[1:]
    return f"{set_cell_size(line, width - 1 - cell_len(end)).rstrip()}…{end}"


def _printable(text: str) -> str:
    """A text with nothing in it that a terminal would obey."""
    return "".join(" " if c.isspace() else c if c.isprintable() else "�" for c in text)


def _wrap_findings(report: DataReport) -> Iterable[str]:
    headline, *rest = map(_printable, describe_findings(report))
    yield from textwrap.wrap(headline, WIDTH)
    for sentence in rest:
        yield from textwrap.wrap(sentence, WIDTH, initial_indent="- ", subsequent_indent="  ")


def _format_tables(report: DataReport) -> Iterable[str]:
    yield _format_table(_split_table(report))
    header, *rows = _histogram_table(report, _draw_bar)
    yield _format_table([(*header[:-1], header[-1].ljust(_BAR)), *rows])
    yield _format_table(_source_table(report))
    if report.generators:
        yield _format_long_table(_generator_table(report), "generators")
    if report.tasks:
        yield _format_long_table(_task_table(report), "tasks")
    yield _format_table(_length_table(report))
    yield _format_table(_repetition_table(report))
    yield "\n".join(_wrap_definitions())


def _wrap_definitions() -> Iterable[str]:
    for name, meaning in DEFINITIONS.items():
        yield from textwrap.wrap(f"{name}: {meaning}", WIDTH, subsequent_indent="  ")


def _format_long_table(rows: Sequence[Row], noun: str) -> str:
    more = len(rows) - 1 - MOST_ROWS
    return _format_table(rows) if more <= 0 else f"{_format_table(rows[: MOST_ROWS + 1])}\nand {more:,} more {noun}"


def _draw_bar(fraction: float) -> str:
    """A bar of a fraction of the width; what is not nothing shows."""
    return ("#" * max(round(fraction * _BAR), fraction > 0)).ljust(_BAR)
