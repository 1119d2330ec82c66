"""How many rows come of a mixture, template by template, before anything is loaded; as text and as JSON.

Prompts or responses that a template leaves blank are dropped when it is rendered, which only rendering can count: an
example here is a row under a template, blank or not, so a plan is an upper bound.
"""

import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from cappy.preparation.mixtures import Mixture, Subset, TemplateFacts, to_values

Kind = Literal["choices", "open-ended"]

T0_ROW_LIMIT = 500_000
"""Rows of a training split above which T0 caps a dataset (t-zero, t0/seqio_tasks/tasks.py)."""

REFERENCE_AND_MISMATCH = 2
"""Responses that an open-ended training example gets beside the sampled ones."""

WIDTH = 100
"""Columns that no line of the text exceeds."""

PUBLISHED_MILLIONS = 160
"""Rows of Cappy's pretraining set as its authors count them (Google Research blog), in millions."""

FULL_MIXTURE_EXAMPLES = 17_000_000
"""Examples below which a plan shows a part of T0's mixture, which the published sum says nothing of."""

Line = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """One template on one split: its examples after the cap, and the rows of the regression set that they make.

    A row of the regression set is a pair of instruction and response. `template` is empty for a task that comes as
    prompts. Both counts are None where the size of the split is unknown.
    """

    subset: str
    split: str
    template: str
    kind: Kind
    examples: int | None
    pairs: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The rows of a mixture and their sums; unknown sizes count for nothing and are named in `unknown`."""

    mixture: str
    rows: tuple[PlanRow, ...]

    def examples(self, kind: Kind | None = None) -> int:
        """Prompted examples, of one kind or of all."""
        return _sum_rows(self.rows, kind, lambda row: row.examples)

    def pairs(self, kind: Kind | None = None) -> int:
        """Rows of the regression set, of one kind or of all."""
        return _sum_rows(self.rows, kind, lambda row: row.pairs)

    @property
    def unknown(self) -> tuple[str, ...]:
        """Subsets with a split of unknown size."""
        return tuple(dict.fromkeys(row.subset for row in self.rows if row.examples is None))


def plan_mixture(mixture: Mixture) -> Plan:
    """The plan of a mixture.

    With choices, an example makes one pair for each choice. Open-ended, it makes one for each sampled response and,
    on a training split, one with its reference and one with a mismatch. A held-out mixture samples nothing: its
    open-ended templates make no pairs, for nothing scores them.
    """
    rows = (row for subset in mixture.subsets for row in _make_plan_rows(subset, mixture.samples))
    return Plan(mixture=mixture.name, rows=tuple(rows))


def cap_rows(num_rows: int, num_templates: int) -> int:
    """Rows of a training split that each of its templates sees: all, or an equal share of 500,000 where it has more."""
    return T0_ROW_LIMIT // num_templates if num_rows > T0_ROW_LIMIT else num_rows


def _make_plan_rows(subset: Subset, samples: int) -> Iterator[PlanRow]:
    for split, num_rows in subset.rows.items():
        for template in subset.templates or (None,):
            examples = num_rows
            if num_rows is not None and split == "train":
                examples = cap_rows(num_rows, max(1, len(subset.templates)))
            yield PlanRow(
                subset=subset.name,
                split=split,
                template=template.name if template else "",
                kind="choices" if template and template.has_choices else "open-ended",
                examples=examples,
                pairs=None if examples is None else round(examples * _count_responses(template, split, samples)),
            )


def _count_responses(template: TemplateFacts | None, split: str, samples: int) -> float:
    """Responses that are paired with one example."""
    if template and template.num_choices is not None:
        return template.num_choices
    return samples + REFERENCE_AND_MISMATCH if split == "train" else samples


def _sum_rows(rows: Sequence[PlanRow], kind: Kind | None, count: Callable[[PlanRow], int | None]) -> int:
    return sum(count(row) or 0 for row in rows if kind in (None, row.kind))


def to_text(mixture: Mixture, *, by_template: bool = False) -> str:
    """The plan as plain text: a line for each dataset (or each template), the sums, and what a person must know."""
    plan = plan_mixture(mixture)
    lines = _template_lines(mixture, plan) if by_template else _subset_lines(mixture, plan)
    sentences = (*_describe(mixture, plan), *_describe_manual(mixture))
    return "\n".join([*_align(lines), "", *(textwrap.fill(sentence, WIDTH) for sentence in sentences)]) + "\n"


def to_json(mixture: Mixture) -> str:
    """The plan as JSON: the mixture's facts, each template with its `examples` and `pairs` by split, and the sums."""
    plan = plan_mixture(mixture)
    values = to_values(mixture)
    for subset in values["subsets"]:
        subset["plan"] = [
            {key: value for key, value in asdict(row).items() if key != "subset"}
            for row in plan.rows
            if row.subset == subset["name"]
        ]
    return json.dumps({**values, "totals": _totals(plan), "notes": list(_describe(mixture, plan))}, indent=1)


def _totals(plan: Plan) -> dict[str, int | list[str]]:
    return {
        "examples": plan.examples(),
        "examples_with_choices": plan.examples("choices"),
        "examples_open_ended": plan.examples("open-ended"),
        "pairs": plan.pairs(),
        "pairs_with_choices": plan.pairs("choices"),
        "pairs_open_ended": plan.pairs("open-ended"),
        "unknown": list(plan.unknown),
    }


def _subset_lines(mixture: Mixture, plan: Plan) -> list[Line]:
    """A header, a line for each subset and the sums; columns of templates only where there are any."""
    counted = any(subset.templates for subset in mixture.subsets)

    def line(name: str, size: str, subsets: Sequence[Subset], rows: Sequence[PlanRow]) -> Line:
        templates = [template for subset in subsets for template in subset.templates]
        with_choices = sum(template.has_choices for template in templates)
        counts = (len(templates), with_choices, len(templates) - with_choices) if counted else ()
        return (name, size, *map(_format_count, (*counts, *_sum_known(rows))))

    header = ("templates", "choices", "open-ended") if counted else ()
    lines: list[Line] = [("dataset", "source rows", *header, "examples", "pairs")]
    for subset in mixture.subsets:
        rows = [row for row in plan.rows if row.subset == subset.name]
        lines.append(line(subset.name, _format_sizes(subset), [subset], rows))
    return [*lines, line("total", "", mixture.subsets, plan.rows)]


def _template_lines(mixture: Mixture, plan: Plan) -> list[Line]:
    """A header, the templates below their subsets, and the sums."""
    lines: list[Line] = [("template", "responses", "examples", "pairs")]
    for subset in mixture.subsets:
        rows = [row for row in plan.rows if row.subset == subset.name]
        choices = {template.name: template.num_choices for template in subset.templates}
        lines.append((subset.name, "", *map(_format_count, _sum_known(rows))))
        for row in rows:
            num_choices = choices.get(row.template)
            kind = row.kind if num_choices is None else f"{num_choices:g} choices"
            lines.append(
                (f"  {row.template or row.split}", kind, _format_count(row.examples), _format_count(row.pairs))
            )
    return [*lines, ("total", "", *map(_format_count, _sum_known(plan.rows)))]


def _sum_known(rows: Sequence[PlanRow]) -> tuple[int | None, int | None]:
    """Examples and pairs of the rows; None where the size of none of them is known."""
    known = [row for row in rows if row.examples is not None]
    if not known:
        return None, None
    return sum(row.examples or 0 for row in known), sum(row.pairs or 0 for row in known)


def _align(lines: Sequence[Line]) -> Iterator[str]:
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


def _describe(mixture: Mixture, plan: Plan) -> Iterator[str]:
    """What the numbers mean, and what they leave out."""
    if mixture.template_version:
        yield f"Templates are counted as {mixture.template_version} has them."
    if mixture.name == "t0":
        yield from _describe_t0(mixture, plan)
    elif mixture.name == "heldout":
        yield "Pairs are what a scorer scores: one for each choice. Templates without choices make none."
    else:
        yield (
            f"Each prompt makes {mixture.samples} pairs with what an LLM samples for it; a training prompt makes "
            f"{REFERENCE_AND_MISMATCH} more, with its reference and with a mismatch."
        )
    if plan.unknown:
        yield f"Size unknown, so not counted: {', '.join(plan.unknown)}."
    num_unverified = sum(not subset.verified for subset in mixture.subsets)
    if num_unverified:
        yield f"{num_unverified} of {len(mixture.subsets)} addresses at the hub are from public text and were never loaded."


def _describe_t0(mixture: Mixture, plan: Plan) -> Iterator[str]:
    yield (
        "Later versions of promptsource give 4 templates of wiqa answer choices as well. Prompts that come out blank "
        "are dropped when rendered, so every count is an upper bound."
    )
    yield (
        f"{_format_millions(plan.examples('choices'), 2)} million examples with choices make one pair for each choice, "
        f"{_format_millions(plan.pairs('choices'))} million pairs. {_format_millions(plan.examples('open-ended'), 2)} million "
        f"open-ended ones make {REFERENCE_AND_MISMATCH + mixture.samples} each (the reference, a mismatch and "
        f"{mixture.samples} sampled responses), {_format_millions(plan.pairs('open-ended'))} million."
    )
    wiki_hop = next((subset for subset in mixture.subsets if subset.name == "wiki_hop/original"), None)
    if wiki_hop is None or plan.examples() < FULL_MIXTURE_EXAMPLES:
        return
    num_choices = [template.num_choices for template in wiki_hop.templates if template.num_choices is not None]
    one_more = cap_rows(wiki_hop.rows["train"] or 0, len(wiki_hop.templates)) * len(num_choices)
    yield (
        f"{_format_millions(plan.pairs())} million pairs by our reconstruction; Cappy's authors say {PUBLISHED_MILLIONS} "
        "million, and no public text found says how they count. How many choices wiki_hop has differs by row: "
        f"{max(num_choices):g} are counted, its paper's average is recalled as 19.8, and one more or less moves the sum by "
        f"{_format_millions(one_more)} million."
    )


def _describe_manual(mixture: Mixture) -> Iterator[str]:
    for subset in mixture.subsets:
        if subset.manual:
            yield f"By hand: {subset.name}. {subset.manual}"


def _format_sizes(subset: Subset) -> str:
    return ", ".join(f"{split} {_format_count(num_rows)}" for split, num_rows in subset.rows.items())


def _format_count(count: int | None) -> str:
    return "?" if count is None else f"{count:,}"


def _format_millions(count: int, digits: int = 1) -> str:
    return f"{count / 1e6:.{digits}f}"
