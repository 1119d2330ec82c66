"""How many rows come of a mixture, template by template, before anything is loaded.

Prompts or responses that a template leaves blank are dropped when it is rendered, which only rendering can count: an
example here is a row under a template, blank or not, so a plan is an upper bound.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from cappy.preparation.mixtures.facts import Mixture, Subset, TemplateFacts

Kind = Literal["choices", "open-ended"]

LIMIT = 500_000
"""Rows of a training split above which T0 caps a dataset (t-zero, t0/seqio_tasks/tasks.py)."""

REFERENCE_AND_MISMATCH = 2
"""Responses that an open-ended training example gets beside the sampled ones."""


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
        return _total(self.rows, kind, lambda row: row.examples)

    def pairs(self, kind: Kind | None = None) -> int:
        """Rows of the regression set, of one kind or of all."""
        return _total(self.rows, kind, lambda row: row.pairs)

    @property
    def unknown(self) -> tuple[str, ...]:
        """Subsets with a split of unknown size."""
        return tuple(dict.fromkeys(row.subset for row in self.rows if row.examples is None))


def plan(mixture: Mixture) -> Plan:
    """The plan of a mixture.

    With choices, an example makes one pair for each choice. Open-ended, it makes one for each sampled response and,
    on a training split, one with its reference and one with a mismatch. A held-out mixture samples nothing: its
    open-ended templates make no pairs, for nothing scores them.
    """
    rows = (row for subset in mixture.subsets for row in _rows(subset, mixture.samples))
    return Plan(mixture=mixture.name, rows=tuple(rows))


def cap(num_rows: int, num_templates: int) -> int:
    """Rows of a training split that each of its templates sees: all, or an equal share of 500,000 where it has more."""
    return LIMIT // num_templates if num_rows > LIMIT else num_rows


def _rows(subset: Subset, samples: int) -> Iterator[PlanRow]:
    for split, num_rows in subset.rows.items():
        for template in subset.templates or (None,):
            examples = num_rows
            if num_rows is not None and split == "train":
                examples = cap(num_rows, max(1, len(subset.templates)))
            yield PlanRow(
                subset=subset.name,
                split=split,
                template=template.name if template else "",
                kind="choices" if template and template.has_choices else "open-ended",
                examples=examples,
                pairs=None if examples is None else round(examples * _responses(template, split, samples)),
            )


def _responses(template: TemplateFacts | None, split: str, samples: int) -> float:
    """Responses that are paired with one example."""
    if template and template.num_choices is not None:
        return template.num_choices
    return samples + REFERENCE_AND_MISMATCH if split == "train" else samples


def _total(rows: Sequence[PlanRow], kind: Kind | None, count: Callable[[PlanRow], int | None]) -> int:
    return sum(count(row) or 0 for row in rows if kind in (None, row.kind))
