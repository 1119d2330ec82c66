"""The findings and tables of the data report, and its text for a terminal.

The text has at most 100 columns and no colours, also when piped. The page shows the same findings and tables.
"""

import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from pydantic import TypeAdapter
from rich.cells import cell_len, set_cell_size

from cappy.annotation.report.record import NUM_BINS, QUANTILES, DataReport, Labels, LengthSummary, PoolStatistics
from cappy.pages import metric_name, percent
from cappy.records.instance import SELECTABLE
from cappy.untrusted import JSON

Row = tuple[str, ...]
Rows = list[Row]

WIDTH = 100
MAX_ROWS = 40
"""Maximum rows of the tables of tasks and generators; the rest is counted in one line."""
_MIN_NAME_WIDTH = 8
_BAR_WIDTH = 30
_NO_VALUE = "–"
DEFINITIONS: Mapping[str, str] = {
    "selectable": "an LLM's response or a choice, with status ok or truncated: what a selector may pick",
    "random, oracle, headroom": "mean label ×100 of a random and of the best selectable response, and their difference",
    "no signal": "instances whose selectable responses all have equal labels, so that the pick does not matter",
    "ties": "pairs of distinct selectable responses of an instance that have equal labels, mean over instances",
    "tied best": "instances in which several distinct selectable responses have the best label",
    "effective": "effective number of distinct responses (exp of the entropy), mean over instances",
    "blank": "responses without words, whatever their status",
    "length": "Unicode characters, or words separated by white space; responses of LLMs and choices",
}
"""The meaning of the columns. Shares and means are over the instances with a selectable response."""


def to_text(report: DataReport) -> str:
    """The findings and tables as text; long names are shortened, and control characters are replaced."""
    parts = ["\n".join(_wrap_findings(report)), *(_format_tables(report) if report.total.instances else ())]
    return "\n\n".join(parts) + "\n"


def to_values(report: DataReport) -> dict[str, JSON]:
    """The report as JSON values: the numbers, with the findings as text."""
    values: dict[str, JSON] = TypeAdapter(DataReport).dump_python(report, mode="json", by_alias=True)
    return {"findings": list(describe_findings(report)), **values}


def describe_findings(report: DataReport) -> tuple[str, ...]:
    """Sentences, headline first; those about problems begin with "Caution"."""
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
        return "There is nothing to select from: no instance has an LLM response or a choice."
    if report.all_tied:
        return "Selection cannot gain anything: all responses of an instance have the same label."
    return (
        f"Mean {metric_name(report.metric)} (×100) is {_format_label(total.random)} for a random response and "
        f"{_format_label(total.oracle)} for the best response of each instance, so selection can gain up to "
        f"{_format_label(total.oracle - total.random)}."
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
    if not total.num_pools:
        return
    subject = "instances" if total.num_pools == total.instances else "instances with a selectable response"
    if total.no_signal:
        share = _format_share(total.no_signal)
        yield f"{share} of the {subject} have no signal: all their selectable responses have equal labels."
    else:
        yield f"All {subject} have a signal: their selectable responses have different labels."
    if total.num_multi_response_pools:
        yield (
            f"{_format_share(total.ties)} of the pairs of distinct responses to the same instance have equal labels; "
            f"in {_format_share(total.best_shared)} of the instances several distinct responses share the best label."
        )


def _variety_sentence(report: DataReport) -> Iterator[str]:
    total = report.total
    if total.num_pools:
        yield (
            f"An instance has {_format_mean(total.selectable / total.num_pools)} selectable responses, "
            f"{_format_mean(total.distinct / total.num_pools)} of them distinct; the effective number is "
            f"{_format_mean(total.effective)}."
        )


def _cautions(report: DataReport) -> Iterator[str]:
    total, instructions, groups = report.total, report.instructions, report.groups
    if total.num_pools and total.num_pools < total.instances:
        without_pool = _format_subject(total.instances - total.num_pools, total.instances, "instance", "has", "have")
        yield f"Caution: {without_pool} no selectable response."
    if report.num_blank:
        yield f"Caution: {_format_subject(report.num_blank, report.responses, 'response', 'is', 'are')} blank."
    for status, count in report.statuses.items():
        # Responses with the status empty are blank and counted above.
        if status not in ("ok", "empty"):
            responses = _format_subject(count, sum(report.statuses.values()), "LLM response", "has", "have")
            consequence = (
                "selectors may pick such responses" if status in SELECTABLE else "selectors never pick such responses"
            )
            yield f"Caution: {responses} the status {status}; {consequence}."
    if instructions.in_several_splits:
        shared = _format_subject(instructions.in_several_splits, instructions.distinct, "instruction", "is", "are")
        yield f"Caution: {shared} in more than one split: the scorer would be tested on what it was trained on."
    if groups.in_several_splits:
        shared = _format_subject(groups.in_several_splits, groups.distinct, "group", "is", "are")
        yield f"Caution: {shared} in more than one split: a group must not be split."
    remedy = "annotate with --metric rougeL_unicode or chrf"
    if report.invisible_to_rouge_l and report.uses_rouge_l:
        invisible = _format_subject(report.invisible_to_rouge_l, total.instances, "instance", "has", "have")
        yield f"Caution: {invisible} no reference with a character that Rouge-L compares ([a-z0-9]); {remedy}."
    if report.partly_invisible_to_rouge_l and report.uses_rouge_l:
        partly = _format_subject(report.partly_invisible_to_rouge_l, total.instances, "instance", "has", "have")
        yield f"Caution: {partly} a reference or response that Rouge-L compares only in part; {remedy}."


def _format_subject(count: int, total: int, noun: str, singular: str, plural: str) -> str:
    """Such as "1 of 20 responses (5.0%) is"."""
    share = f"{_format_count(count)} of {_format_noun(total, noun)} ({_format_percentage(count, total)})"
    return f"{share} {singular if count == 1 else plural}"


def _format_noun(count: int, noun: str) -> str:
    return f"{_format_count(count)} {noun if count == 1 else f'{noun}s'}"


def build_tables(report: DataReport) -> dict[str, Rows]:
    """The tables by name: rows of cells, header first."""
    return {
        "splits": _split_table(report),
        "tasks": _task_table(report),
        "sources": _source_table(report),
        "generators": _generator_table(report),
        "lengths": _length_table(report),
        "repetition": _repetition_table(report),
    }


def _split_table(report: DataReport) -> Rows:
    """By split and in total: sizes, and what selection can gain."""
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

    def row(name: str, values: PoolStatistics) -> Row:
        headroom = None if values.oracle is None or values.random is None else values.oracle - values.random
        return (
            name,
            *map(_format_count, (values.instances, values.candidates, values.selectable)),
            *map(_format_label, (values.random, values.oracle, headroom)),
            _format_share(values.no_signal),
            _format_mean(values.effective),
        )

    return [header, *(row(name, values) for name, values in report.splits.items()), row("all", report.total)]


def _task_table(report: DataReport) -> Rows:
    """By task: size, labels and ties."""
    header = ("task", "instances", "candidates", "random", "oracle", "no\nsignal", "ties", "tied\nbest", "effective")

    def row(name: str, values: PoolStatistics) -> Row:
        return (
            name or "(no task)",
            *map(_format_count, (values.instances, values.candidates)),
            *map(_format_label, (values.random, values.oracle)),
            *map(_format_share, (values.no_signal, values.ties, values.best_shared)),
            _format_mean(values.effective),
        )

    return [header, *(row(name, values) for name, values in report.tasks.items())]


def _source_table(report: DataReport) -> Rows:
    """By source of the candidates: counts and labels."""
    return [
        ("source", "candidates", "mean", "exactly\n0", "exactly\n1"),
        *((name, *_label_columns(labels)) for name, labels in report.sources.items()),
    ]


def _generator_table(report: DataReport) -> Rows:
    """By LLM and decoding: counts, labels and blank responses."""
    generators = report.generators
    return [
        ("generator and decoding", "responses", "mean", "exactly\n0", "exactly\n1", "blank"),
        *((g.name, *_label_columns(g.labels), _format_percentage(g.num_blank, g.labels.count)) for g in generators),
    ]


def _length_table(report: DataReport) -> Rows:
    """Lengths of instructions, references and responses."""

    def row(name: str, lengths: LengthSummary) -> Row:
        return (
            name,
            _format_count(lengths.num_texts),
            *(_format_count(lengths.quantiles.get(key)) for key in (*map(str, QUANTILES), "max")),
        )

    return [
        ("length", "texts", "5%", "25%", "median", "75%", "95%", "99%", "longest"),
        *(row(f"{name}, words", lengths) for name, lengths in report.words.items()),
        *(row(f"{name}, characters", lengths) for name, lengths in report.characters.items()),
    ]


def _repetition_table(report: DataReport) -> Rows:
    """Repeated responses and instructions."""
    instructions, num_responses = report.instructions, report.total.selectable
    num_duplicates = num_responses - report.total.distinct

    def row(name: str, count: int, total: int) -> Row:
        return (name, _format_count(count), _format_percentage(count, total))

    return [
        ("repetition", "count", "share"),
        row("responses that duplicate another response to the same instance", num_duplicates, num_responses),
        row("instructions that repeat another one", instructions.repeats, instructions.values),
        row("instructions in more than one split", instructions.in_several_splits, instructions.distinct),
    ]


def _histogram_table(report: DataReport, bar: Callable[[float], str]) -> Rows:
    """Histogram of labels by source, with bars for the selectable sources.

    `bar` draws a bar, given its length as a fraction of the longest one. If no label lies between 0 and 1, all bins are
    one row.
    """
    names, columns = _bin_names(), [labels.bin_counts for labels in report.sources.values()]
    if not any(report.labels.bins):
        names, columns = [names[0], "between", names[-1]], [(counts[0], 0, counts[-1]) for counts in columns]
    selectable = selectable_sources(report)
    sums = [
        sum(counts[index] for counts, source in zip(columns, report.sources, strict=True) if source in selectable)
        for index in range(len(names))
    ]
    highest = max(sums) or 1
    return [
        ("label", *report.sources, " and ".join(selectable) or "nothing selectable"),
        *(
            (name, *(_format_count(counts[index]) for counts in columns), bar(sums[index] / highest))
            for index, name in enumerate(names)
        ),
    ]


def selectable_sources(report: DataReport) -> list[str]:
    """The sources of the report whose candidates a selector may pick."""
    return [source for source in report.sources if source in ("choice", "llm")]


def _bin_names() -> list[str]:
    """The names of the bins in `Labels.bin_counts`."""
    edges = [f"{index / NUM_BINS:.2f}" for index in range(NUM_BINS + 1)]
    return ["exactly 0", *(f"{low} to {high}" for low, high in pairwise(edges)), "exactly 1"]


def _label_columns(labels: Labels) -> Row:
    zero, one = (_format_percentage(count, labels.count) for count in (labels.zero, labels.one))
    return (_format_count(labels.count), _format_label(labels.mean), zero, one)


def _format_label(value: float | None) -> str:
    """A label of 0 to 1, x 100."""
    return _NO_VALUE if value is None else percent(value)


def _format_share(value: float | None) -> str:
    """A share of 0 to 1 in percent; shares near 0 or 1 are not rounded to them."""
    if value is None:
        return _NO_VALUE
    if 0 < value < 0.0005:
        return "<0.1%"
    return ">99.9%" if 0.9995 < value < 1 else f"{100 * value:.1f}%"


def _format_percentage(count: int, total: int) -> str:
    """The share of `count` in `total` in percent."""
    return _format_share(count / total if total else None)


def _format_mean(value: float | None) -> str:
    """A mean, such as responses per instance."""
    return _NO_VALUE if value is None else f"{value:,.1f}"


def _format_count(value: int | None) -> str:
    """A count with thousands separators."""
    return _NO_VALUE if value is None else f"{value:,}"


def _format_table(rows: Sequence[Row]) -> str:
    """Formats rows as a table of at most `WIDTH` columns: header first, names to the left, numbers to the right.

    Header cells may have several lines.
    """
    header = [cell.split("\n") for cell in rows[0]]
    height = max(map(len, header))
    header_rows = [tuple(([""] * (height - len(cell)) + cell)[line] for cell in header) for line in range(height)]
    all_rows = [*header_rows, *rows[1:]]
    widths = [max(cell_len(row[column]) for row in all_rows) for column in range(1, len(header))]
    width = max(WIDTH - sum(widths) - 2 * len(widths), _MIN_NAME_WIDTH)
    names = [_shorten(row[0], width) for row in all_rows]
    first = max(map(cell_len, names))
    lines = (
        [name + " " * (first - cell_len(name)), *(f"{cell:>{w}}" for cell, w in zip(row[1:], widths, strict=True))]
        for name, row in zip(names, all_rows, strict=True)
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _shorten(name: str, width: int) -> str:
    """A name on one line, shortened in the middle to `width` columns."""
    line = _printable(name)
    if cell_len(line) <= width:
        return line
    tail = (width - 1) // 2
    end = line[-tail:]
    while cell_len(end) > tail:
        end = end[1:]
    return f"{set_cell_size(line, width - 1 - cell_len(end)).rstrip()}…{end}"


def _printable(text: str) -> str:
    """The text without control characters."""
    return "".join(" " if c.isspace() else c if c.isprintable() else "�" for c in text)


def _wrap_findings(report: DataReport) -> Iterable[str]:
    headline, *rest = map(_printable, describe_findings(report))
    yield from textwrap.wrap(headline, WIDTH)
    for sentence in rest:
        yield from textwrap.wrap(sentence, WIDTH, initial_indent="- ", subsequent_indent="  ")


def _format_tables(report: DataReport) -> Iterable[str]:
    yield _format_table(_split_table(report))
    header, *rows = _histogram_table(report, _draw_bar)
    yield _format_table([(*header[:-1], header[-1].ljust(_BAR_WIDTH)), *rows])
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
    more = len(rows) - 1 - MAX_ROWS
    return _format_table(rows) if more <= 0 else f"{_format_table(rows[: MAX_ROWS + 1])}\nand {more:,} more {noun}"


def _draw_bar(fraction: float) -> str:
    """A bar for a fraction of the width, at least one character unless the fraction is 0."""
    return ("#" * max(round(fraction * _BAR_WIDTH), fraction > 0)).ljust(_BAR_WIDTH)
