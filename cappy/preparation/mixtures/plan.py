"""Counts the rows that a mixture makes, by template, before anything is loaded; writes the counts as text or JSON.

An example is a source row rendered with a template. Rendering drops blank prompts and responses, so the counts are
upper bounds.
"""

import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from cappy.preparation.mixtures import Mixture, Subset, TemplateFacts, to_values

Kind = Literal["choices", "open-ended"]

T0_ROW_LIMIT = 500_000
"""T0 caps a training split with more rows than this (t-zero, t0/seqio_tasks/tasks.py)."""

NUM_EXTRA_TRAINING_PAIRS = 2
"""An open-ended training example makes a pair with its reference and one with a mismatch, besides sampled responses.

A mismatch is the reference of another instance.
"""

WIDTH = 100
"""Maximum line width of the text."""

PUBLISHED_MILLIONS = 160
"""Rows of Cappy's pretraining set according to its authors (Google Research blog), in millions."""

FULL_MIXTURE_EXAMPLES = 17_000_000
"""A plan with fewer examples is for a part of T0's mixture, and is not compared with the published sum."""

Line = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """One template on one split: its examples after the cap, and the rows of the regression set made from them.

    A row of the regression set is a pair of instruction and response. `template` is empty for a dataset of prompts.
    Both counts are None if the size of the split is unknown.
    """

    subset: str
    split: str
    template: str
    kind: Kind
    examples: int | None
    pairs: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MixturePlan:
    """The rows of a mixture and their sums; unknown sizes are not counted and are listed in `unknown`."""

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
        """Subsets that have a split of unknown size."""
        return tuple(dict.fromkeys(row.subset for row in self.rows if row.examples is None))


def plan_mixture(mixture: Mixture) -> MixturePlan:
    """Counts the examples and pairs of a mixture.

    With choices, an example makes one pair for each choice. An open-ended example makes one pair for each sampled
    response and, on a training split, one with its reference and one with a mismatch (the reference of another
    instance). A held-out mixture samples no
    responses, so its open-ended templates make no pairs.
    """
    rows = (row for subset in mixture.subsets for row in _make_plan_rows(subset, mixture.samples))
    return MixturePlan(mixture=mixture.name, rows=tuple(rows))


def cap_rows(num_rows: int, num_templates: int) -> int:
    """Rows of a training split for each of its templates: all, or an equal share of 500,000 if it has more."""
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
    """The number of responses paired with one example."""
    if template and template.num_choices is not None:
        return template.num_choices
    return samples + NUM_EXTRA_TRAINING_PAIRS if split == "train" else samples


def _sum_rows(rows: Sequence[PlanRow], kind: Kind | None, count: Callable[[PlanRow], int | None]) -> int:
    return sum(count(row) or 0 for row in rows if kind in (None, row.kind))


def to_text(mixture: Mixture, *, by_template: bool = False) -> str:
    """The plan as text: a line for each dataset (or template), the sums, and notes."""
    plan = plan_mixture(mixture)
    lines = _template_lines(mixture, plan) if by_template else _subset_lines(mixture, plan)
    sentences = (*_describe(mixture, plan), *_describe_manual(mixture))
    return "\n".join([*_align(lines), "", *(textwrap.fill(sentence, WIDTH) for sentence in sentences)]) + "\n"


def to_json(mixture: Mixture) -> str:
    """The plan as JSON: the facts of the mixture, `examples` and `pairs` by template and split, and the sums."""
    plan = plan_mixture(mixture)
    values = to_values(mixture)
    for subset in values["subsets"]:
        subset["plan"] = [
            {key: value for key, value in asdict(row).items() if key != "subset"}
            for row in plan.rows
            if row.subset == subset["name"]
        ]
    return json.dumps({**values, "totals": _totals(plan), "notes": list(_describe(mixture, plan))}, indent=1)


def _totals(plan: MixturePlan) -> dict[str, int | list[str]]:
    return {
        "examples": plan.examples(),
        "examples_with_choices": plan.examples("choices"),
        "examples_open_ended": plan.examples("open-ended"),
        "pairs": plan.pairs(),
        "pairs_with_choices": plan.pairs("choices"),
        "pairs_open_ended": plan.pairs("open-ended"),
        "unknown": list(plan.unknown),
    }


def _subset_lines(mixture: Mixture, plan: MixturePlan) -> list[Line]:
    """A header, a line for each subset, and the sums; with columns for templates if there are any."""
    has_templates = any(subset.templates for subset in mixture.subsets)

    def line(name: str, size: str, subsets: Sequence[Subset], rows: Sequence[PlanRow]) -> Line:
        templates = [template for subset in subsets for template in subset.templates]
        with_choices = sum(template.has_choices for template in templates)
        counts = (len(templates), with_choices, len(templates) - with_choices) if has_templates else ()
        return (name, size, *map(_format_count, (*counts, *_sum_known(rows))))

    header = ("templates", "choices", "open-ended") if has_templates else ()
    lines: list[Line] = [("dataset", "source rows", *header, "examples", "pairs")]
    for subset in mixture.subsets:
        rows = [row for row in plan.rows if row.subset == subset.name]
        lines.append(line(subset.name, _format_sizes(subset), [subset], rows))
    return [*lines, line("total", "", mixture.subsets, plan.rows)]


def _template_lines(mixture: Mixture, plan: MixturePlan) -> list[Line]:
    """A header, each subset with its templates below it, and the sums."""
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
    """Examples and pairs of the rows; None if no size is known."""
    known = [row for row in rows if row.examples is not None]
    if not known:
        return None, None
    return sum(row.examples or 0 for row in known), sum(row.pairs or 0 for row in known)


def _align(lines: Sequence[Line]) -> Iterator[str]:
    """Pads columns to their widest cell, aligns numbers to the right, and puts a blank line before the sums."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for index, line in enumerate(lines):
        if index == len(lines) - 1:
            yield ""
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield "  ".join(cells)


def _describe(mixture: Mixture, plan: MixturePlan) -> Iterator[str]:
    """Sentences on what the numbers mean and what they leave out."""
    if mixture.template_version:
        yield f"Templates are counted as of {mixture.template_version}."
    if mixture.name == "t0":
        yield from _describe_t0(mixture, plan)
    elif mixture.name == "heldout":
        yield "A scorer scores one pair for each choice. Templates without choices make no pairs."
    else:
        yield (
            f"Each prompt makes {mixture.samples} pairs with responses sampled by an LLM; a training prompt makes "
            f"{NUM_EXTRA_TRAINING_PAIRS} more, with its reference and with a mismatch (another prompt's reference)."
        )
    if plan.unknown:
        yield f"Size unknown, so not counted: {', '.join(plan.unknown)}."
    num_unverified = sum(not subset.verified for subset in mixture.subsets)
    if num_unverified:
        count = f"{num_unverified} of {len(mixture.subsets)}"
        yield f"{count} hub addresses were taken from public texts and have not been tried."


def _describe_t0(mixture: Mixture, plan: MixturePlan) -> Iterator[str]:
    yield (
        "Later versions of promptsource add answer choices to 4 templates of wiqa. Blank prompts are dropped when "
        "rendered, so every count is an upper bound."
    )
    yield (
        f"{_millions(plan.examples('choices'), 2)} million examples with choices make one pair for each choice, "
        f"{_millions(plan.pairs('choices'))} million pairs. {_millions(plan.examples('open-ended'), 2)} million "
        f"open-ended examples make {NUM_EXTRA_TRAINING_PAIRS + mixture.samples} pairs each (the reference, a mismatch "
        f"and {mixture.samples} sampled responses), {_millions(plan.pairs('open-ended'))} million pairs."
    )
    wiki_hop = next((subset for subset in mixture.subsets if subset.name == "wiki_hop/original"), None)
    if wiki_hop is None or plan.examples() < FULL_MIXTURE_EXAMPLES:
        return
    num_choices = [template.num_choices for template in wiki_hop.templates if template.num_choices is not None]
    pairs_per_choice = cap_rows(wiki_hop.rows["train"] or 0, len(wiki_hop.templates)) * len(num_choices)
    yield (
        f"This reconstruction has {_millions(plan.pairs())} million pairs; Cappy's authors report {PUBLISHED_MILLIONS} "
        "million, and no public explanation of their count was found. The number of choices of wiki_hop varies by row: "
        f"{max(num_choices):g} are counted, the average in its paper is probably 19.8, and one choice more or less "
        f"changes the sum by {_millions(pairs_per_choice)} million."
    )


def _describe_manual(mixture: Mixture) -> Iterator[str]:
    for subset in mixture.subsets:
        if subset.manual:
            yield f"To download by hand: {subset.name}. {subset.manual}"


def _format_sizes(subset: Subset) -> str:
    return ", ".join(f"{split} {_format_count(num_rows)}" for split, num_rows in subset.rows.items())


def _format_count(count: int | None) -> str:
    return "?" if count is None else f"{count:,}"


def _millions(count: int, digits: int = 1) -> str:
    return f"{count / 1e6:.{digits}f}"
