"""The tables of a data report: rows of texts, the header first, for a terminal and for the page."""

from collections.abc import Callable, Mapping
from itertools import pairwise

from cappy.annotation.report.numbers import count, label, number, part, share
from cappy.annotation.report.record import NUM_BINS, QUANTILES, DataReport, Labels, Lengths, Pools

Row = tuple[str, ...]
Rows = list[Row]


def splits(report: DataReport) -> Rows:
    """Each split and all of them: sizes, what selection can gain."""
    header = ("split", "instances", "candidates", "selectable", "random", "oracle", "room", "no\nsignal", "effective")

    def row(name: str, pools: Pools) -> Row:
        room = None if pools.oracle is None or pools.random is None else pools.oracle - pools.random
        return (
            name,
            *map(count, (pools.instances, pools.candidates, pools.selectable)),
            *map(label, (pools.random, pools.oracle, room)),
            share(pools.no_signal),
            number(pools.effective),
        )

    return [header, *(row(name, pools) for name, pools in report.splits.items()), row("all", report.total)]


def tasks(report: DataReport) -> Rows:
    """Each task: its size, its labels, its ties."""
    header = ("task", "instances", "candidates", "random", "oracle", "no\nsignal", "ties", "tied\nbest", "effective")

    def row(name: str, pools: Pools) -> Row:
        return (
            name or "(no task)",
            *map(count, (pools.instances, pools.candidates)),
            *map(label, (pools.random, pools.oracle)),
            *map(share, (pools.no_signal, pools.ties, pools.best_shared)),
            number(pools.effective),
        )

    return [header, *(row(name, pools) for name, pools in report.tasks.items())]


def sources(report: DataReport) -> Rows:
    """Where candidates come from, and their labels."""
    return [
        ("source", "candidates", "mean", "exactly\n0", "exactly\n1"),
        *((name, *_of(labels)) for name, labels in report.sources.items()),
    ]


def generators(report: DataReport) -> Rows:
    """Each LLM with each of its ways of decoding, and the labels of its responses."""
    return [
        ("generator and decoding", "responses", "mean", "exactly\n0", "exactly\n1", "blank"),
        *((g.name, *_of(g.labels), part(g.empty, g.labels.count)) for g in report.generators),
    ]


def lengths(report: DataReport) -> Rows:
    """How long instructions, references and responses are."""

    def row(name: str, lengths: Lengths) -> Row:
        return (
            name,
            count(lengths.texts),
            *(count(lengths.quantiles.get(key)) for key in (*map(str, QUANTILES), "max")),
        )

    return [
        ("length", "texts", "5%", "25%", "median", "75%", "95%", "99%", "longest"),
        *(row(f"{name}, words", held) for name, held in report.words.items()),
        *(row(f"{name}, characters", held) for name, held in report.characters.items()),
    ]


def repetition(report: DataReport) -> Rows:
    """What stands there more than once."""
    total, instructions = report.total, report.instructions

    def row(name: str, some: int, of: int) -> Row:
        return (name, count(some), part(some, of))

    return [
        ("repetition", "count", "share"),
        row("responses that repeat one of their instance", total.selectable - total.distinct, total.selectable),
        row("instructions that repeat another one", instructions.repeated, instructions.values),
        row("instructions in more than one split", instructions.in_several_splits, instructions.distinct),
    ]


def histogram(report: DataReport, bar: Callable[[float], str]) -> Rows:
    """Labels by source, and bars over what a selector chooses among; `bar` draws a fraction of the longest.

    Where no label lies between 0 and 1, all bins are one row.
    """
    names, columns = cell_names(), [labels.cells for labels in report.sources.values()]
    if not any(report.labels.bins):
        names, columns = [names[0], "between", names[-1]], [(cells[0], 0, cells[-1]) for cells in columns]
    chosen = selectable_sources(report)
    sums = [sum(c[at] for c, s in zip(columns, report.sources, strict=True) if s in chosen) for at in range(len(names))]
    most = max(sums) or 1
    return [
        ("label", *report.sources, " and ".join(chosen) or "nothing selectable"),
        *((name, *(count(cells[at]) for cells in columns), bar(sums[at] / most)) for at, name in enumerate(names)),
    ]


def selectable_sources(report: DataReport) -> list[str]:
    """The sources, of those that there are, whose candidates a selector may pick."""
    return [source for source in report.sources if source in ("choice", "llm")]


def cell_names() -> list[str]:
    """What each of `Labels.cells` counts."""
    edges = [f"{index / NUM_BINS:.2f}" for index in range(NUM_BINS + 1)]
    return ["exactly 0", *(f"{low} to {high}" for low, high in pairwise(edges)), "exactly 1"]


DEFINITIONS: Mapping[str, str] = {
    "selectable": "an LLM's response or a choice, with status ok or truncated: what a selector may pick",
    "random, oracle, room": "mean label ×100 of a random and of the best selectable response, and their difference",
    "no signal": "instances whose selectable responses all have equal labels: whichever is picked, nothing changes",
    "ties": "pairs of different selectable responses of an instance with equal labels, mean over instances",
    "tied best": "instances whose best label several different selectable responses have",
    "effective": "as many equally frequent responses would vary as much (exp of the entropy), mean over instances",
    "blank": "responses without a word, whatever their status",
    "length": "characters of Unicode, and words between white space; a response is an LLM's or a choice",
}
"""What the columns mean. Shares and means are over the instances that have a selectable response."""


def _of(labels: Labels) -> Row:
    zero, one = (part(some, labels.count) for some in (labels.zero, labels.one))
    return (count(labels.count), label(labels.mean), zero, one)
