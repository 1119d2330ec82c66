"""The plan of a mixture as text for a terminal or a file, and as JSON."""

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from cappy.preparation.mixtures.facts import Mixture, Subset, to_values
from cappy.preparation.mixtures.plan import REFERENCE_AND_MISMATCH, Plan, PlanRow, cap, plan

WIDTH = 100
"""Columns that no line of the text exceeds."""

PUBLISHED_MILLIONS = 160
"""Rows of Cappy's pretraining set as its authors count them (Google Research blog), in millions."""

WHOLE_EXAMPLES = 17_000_000
"""Examples below which a plan shows a part of T0's mixture, which the published sum says nothing of."""

Line = tuple[str, ...]


def text(mixture: Mixture, *, by_template: bool = False) -> str:
    """The plan as plain text: a line for each dataset (or each template), the sums, and what a person must know."""
    planned = plan(mixture)
    lines = _template_lines(mixture, planned) if by_template else _subset_lines(mixture, planned)
    sentences = (*_sentences(mixture, planned), *_by_hand(mixture))
    return "\n".join([*_aligned(lines), "", *(textwrap.fill(sentence, WIDTH) for sentence in sentences)]) + "\n"


def to_json(mixture: Mixture) -> str:
    """The plan as JSON: the mixture's facts, each template with its `examples` and `pairs` by split, and the sums."""
    planned = plan(mixture)
    values = to_values(mixture)
    for subset in values["subsets"]:
        subset["plan"] = [
            {key: value for key, value in asdict(row).items() if key != "subset"}
            for row in planned.rows
            if row.subset == subset["name"]
        ]
    return json.dumps({**values, "totals": _totals(planned), "notes": list(_sentences(mixture, planned))}, indent=1)


def _totals(planned: Plan) -> dict[str, Any]:
    return {
        "examples": planned.examples(),
        "examples_with_choices": planned.examples("choices"),
        "examples_open_ended": planned.examples("open-ended"),
        "pairs": planned.pairs(),
        "pairs_with_choices": planned.pairs("choices"),
        "pairs_open_ended": planned.pairs("open-ended"),
        "unknown": list(planned.unknown),
    }


def _subset_lines(mixture: Mixture, planned: Plan) -> list[Line]:
    """A header, a line for each subset and the sums; columns of templates only where there are any."""
    counted = any(subset.templates for subset in mixture.subsets)

    def line(name: str, size: str, subsets: Sequence[Subset], rows: Sequence[PlanRow]) -> Line:
        templates = [template for subset in subsets for template in subset.templates]
        with_choices = sum(template.has_choices for template in templates)
        counts = (len(templates), with_choices, len(templates) - with_choices) if counted else ()
        return (name, size, *map(_number, (*counts, *_sums(rows))))

    header = ("templates", "choices", "open-ended") if counted else ()
    lines: list[Line] = [("dataset", "source rows", *header, "examples", "pairs")]
    for subset in mixture.subsets:
        rows = [row for row in planned.rows if row.subset == subset.name]
        lines.append(line(subset.name, _size(subset), [subset], rows))
    return [*lines, line("total", "", mixture.subsets, planned.rows)]


def _template_lines(mixture: Mixture, planned: Plan) -> list[Line]:
    """A header, the templates below their subsets, and the sums."""
    lines: list[Line] = [("template", "responses", "examples", "pairs")]
    for subset in mixture.subsets:
        rows = [row for row in planned.rows if row.subset == subset.name]
        choices = {template.name: template.num_choices for template in subset.templates}
        lines.append((subset.name, "", *map(_number, _sums(rows))))
        for row in rows:
            number = choices.get(row.template)
            kind = row.kind if number is None else f"{number:g} choices"
            lines.append((f"  {row.template or row.split}", kind, _number(row.examples), _number(row.pairs)))
    return [*lines, ("total", "", *map(_number, _sums(planned.rows)))]


def _sums(rows: Sequence[PlanRow]) -> tuple[int | None, int | None]:
    """Examples and pairs of the rows; None where the size of none of them is known."""
    known = [row for row in rows if row.examples is not None]
    if not known:
        return None, None
    return sum(row.examples or 0 for row in known), sum(row.pairs or 0 for row in known)


def _aligned(lines: Sequence[Line]) -> Iterator[str]:
    """Columns padded to their widest cell, numbers to the right, the last line (the sums) set apart."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for index, line in enumerate(lines):
        if index == len(lines) - 1:
            yield ""
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield "  ".join(cells)


def _sentences(mixture: Mixture, planned: Plan) -> Iterator[str]:
    """What the numbers mean, and what they leave out."""
    if mixture.template_version:
        yield f"Templates are counted as {mixture.template_version} has them."
    if mixture.name == "t0":
        yield from _about_t0(mixture, planned)
    elif mixture.name == "heldout":
        yield "Pairs are what a scorer scores: one for each choice. Templates without choices make none."
    else:
        yield (
            f"Each prompt makes {mixture.samples} pairs with what an LLM samples for it; a training prompt makes "
            f"{REFERENCE_AND_MISMATCH} more, with its reference and with a mismatch."
        )
    if planned.unknown:
        yield f"Size unknown, so not counted: {', '.join(planned.unknown)}."
    unseen = sum(not subset.verified for subset in mixture.subsets)
    if unseen:
        yield f"{unseen} of {len(mixture.subsets)} addresses at the hub are from public text and were never loaded."


def _about_t0(mixture: Mixture, planned: Plan) -> Iterator[str]:
    yield (
        "Later versions of promptsource give 4 templates of wiqa answer choices as well. Prompts that come out blank "
        "are dropped when rendered, so every count is an upper bound."
    )
    yield (
        f"{_millions(planned.examples('choices'), 2)} million examples with choices make one pair for each choice, "
        f"{_millions(planned.pairs('choices'))} million pairs. {_millions(planned.examples('open-ended'), 2)} million "
        f"open-ended ones make {REFERENCE_AND_MISMATCH + mixture.samples} each (the reference, a mismatch and "
        f"{mixture.samples} sampled responses), {_millions(planned.pairs('open-ended'))} million."
    )
    varying = next((subset for subset in mixture.subsets if subset.name == "wiki_hop/original"), None)
    if varying is None or planned.examples() < WHOLE_EXAMPLES:
        return
    numbers = [template.num_choices for template in varying.templates if template.num_choices is not None]
    one_more = cap(varying.rows["train"] or 0, len(varying.templates)) * len(numbers)
    yield (
        f"{_millions(planned.pairs())} million pairs by our reconstruction; Cappy's authors say {PUBLISHED_MILLIONS} "
        "million, and no public text found says how they count. How many choices wiki_hop has differs by row: "
        f"{max(numbers):g} are counted, its paper's average is recalled as 19.8, and one more or less moves the sum by "
        f"{_millions(one_more)} million."
    )


def _by_hand(mixture: Mixture) -> Iterator[str]:
    for subset in mixture.subsets:
        if subset.manual:
            yield f"By hand: {subset.name}. {subset.manual}"


def _size(subset: Subset) -> str:
    return ", ".join(f"{split} {_number(num_rows)}" for split, num_rows in subset.rows.items())


def _number(count: int | None) -> str:
    return "?" if count is None else f"{count:,}"


def _millions(count: int, digits: int = 1) -> str:
    return f"{count / 1e6:.{digits}f}"
