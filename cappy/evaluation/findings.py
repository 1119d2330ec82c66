"""What an evaluation finds, one record per kind of finding and all together; all numbers are of 0 to 1."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cappy.pages.words import percent

ReportValues = Mapping[str, Any]
"""The values of a report.json, or of a part of it, as they stand there: of this version or of another one."""
SCHEMA = 3
"""Goes up when a field changes its meaning or goes; a field that is added needs no other number."""
OUT_OF_FOLD = "out_of_fold.json"
"""What a cross-fitted evaluation leaves beside a scorer; see `cappy.evaluation.crossfit`."""
LEVEL = 0.95
"""Of every interval."""
MIN_GROUPS = 30
"""With fewer, no interval that was tried keeps its promise where differences are skewed: benchmarks/intervals.py."""
WITHIN_REACH = 20
"""Times the groups at hand that a person may go and find."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its 95% interval, on the metric's scale of 0 to 1."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A paired difference of two means with its 95% interval, and what the interval at another level needs.

    `p_value` is two-sided, against a true difference of 0. `standard_error`, the `skewness` of the mean and the degrees
    of `freedom` are those of `cappy.evaluation.statistics`; the standard error is None of a single `groups`.
    """

    difference: float
    low: float
    high: float
    p_value: float
    standard_error: float | None
    skewness: float
    freedom: float
    groups: int


@dataclass(frozen=True, kw_only=True)
class Power:
    """What so many groups can show of a comparison, and how many the difference that was found would need.

    `smallest` is the difference that an interval of 95% leaves 0 out of with a probability of 80%; `groups_needed` is
    None where no difference was found.
    """

    groups: int
    smallest: float
    groups_needed: int | None

    @property
    def within_reach(self) -> bool:
        """Whether a person may go and find as many groups as would show the difference."""
        return self.groups_needed is not None and self.groups_needed <= WITHIN_REACH * self.groups


@dataclass(frozen=True, kw_only=True)
class Row:
    """One selector: its mean label, its gain over random choice, what was chosen for it on held-out instances.

    `ties` counts the instances where candidates with different labels share the highest value; the mean of their labels
    counts.
    """

    estimate: Estimate
    gain: Difference
    ties: int = 0
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class TaskRow:
    """One task: the mean label of each selector, and the gain of the scorer (or of MBR without one) over random choice.

    `kind` is "choice" where every instance is a choice from a closed set; `templates` then has the accuracy of the same
    selector by template. `against_champion` is the scorer's difference to the champion, where there is one.
    """

    task: str
    kind: str
    instances: int
    means: Mapping[str, float]
    gain: Difference
    templates: Mapping[str, float] = field(default_factory=dict)
    against_champion: Difference | None = None


@dataclass(frozen=True, kw_only=True)
class Average:
    """Unweighted means over tasks and the subject's gain over random choice; intervals are over tasks."""

    tasks: int
    means: Mapping[str, Estimate]
    gain: Difference


@dataclass(frozen=True, kw_only=True)
class Pick:
    """What a selector picked in an example, with its label."""

    selector: str
    response: str
    label: float


@dataclass(frozen=True, kw_only=True)
class RatedCandidate:
    """A candidate with its label, the scorer's score and MBR's value; None where there is no such selector."""

    response: str
    label: float
    score: float | None = None
    mbr: float | None = None


@dataclass(frozen=True, kw_only=True)
class Example:
    """An instance to look at, with the picks of the selectors and its candidates, best score first."""

    instance_id: str
    task: str
    instruction: str
    references: tuple[str, ...]
    picks: tuple[Pick, ...]
    candidates: tuple[RatedCandidate, ...] = ()
    left_out: int = 0


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Picks with neighbouring scores: their mean score, their mean label, how many they are."""

    score: float
    label: float
    count: int


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """How far the scores of picks are from their labels, over the pick of every pool.

    `ece` is the expected calibration error: the mean distance of the bins' mean score and mean label, weighted by their
    size (Naeini, Cooper and Hauskrecht, 2015), here with bins of equal size. `brier` is the mean squared difference of
    score and label (Brier, 1950).
    """

    ece: float
    brier: float
    bins: tuple[Bin, ...]


@dataclass(frozen=True, kw_only=True)
class CalibrationResult:
    """The picks' scores as they are, and after the calibration that was fitted on `fitted_on` held-out groups.

    `spread` is the difference of an instance's highest and lowest score, in the median; None where nobody measured it.
    """

    raw: Reliability
    calibrated: Reliability | None = None
    fitted_on: int = 0
    spread: float | None = None


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Mean label of the picks that are kept when only the share of instances with the highest scores is answered.

    `quality[i]` belongs to `coverage[i]`; `random` is what keeping the same share at random gives.
    """

    coverage: tuple[float, ...]
    quality: tuple[float, ...]
    random: float


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One number on a weakness that scorers are known for, and what it says, in a sentence."""

    name: str
    value: float
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a candidate costs: tokens that the LLM wrote, seconds that the scorer took; None where nobody counted."""

    tokens: float | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class PublishedTask:
    """A task that was published too: our number and the published ones by model, x 100, with their source."""

    task: str
    ours: float
    numbers: Mapping[str, float]
    source: str


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Everything that an evaluation found; numbers are on the metric's scale of 0 to 1.

    `comparisons` maps "one-other" to their paired difference; "scorer-likelihood" compares with the likelihood selector
    named in `better_likelihood`, the better one on the reported split itself, which favours the baseline. `adjusted`
    has the comparisons' p-values after Holm's correction. `averages` are unweighted means over tasks. `leaks` counts
    reported instances that a scorer was trained on or stopped by, or other templates of whose rows it was. `pays_until`
    is the number of candidates beyond which one more adds less than 0.001; 0 where no scorer was given. `folds` is
    above 0 where the report was cross-fitted: it is then about the recipe, not about the scorer in `versions`.
    `tested_groups` is a sketch of the reported groups (`cappy.records.overlap`), by which the gate counts how often
    they were used.
    """

    metric: str
    split: str
    seed: int
    facts: Mapping[str, int]
    selectors: Mapping[str, Row]
    unavailable: Mapping[str, str]
    comparisons: Mapping[str, Difference]
    curve: Mapping[str, tuple[Estimate, ...]]
    adjusted: Mapping[str, float] = field(default_factory=dict)
    power: Mapping[str, Power] = field(default_factory=dict)
    tasks: tuple[TaskRow, ...] = ()
    averages: Mapping[str, Average] = field(default_factory=dict)
    examples: tuple[Example, ...] = ()
    worst: tuple[Example, ...] = ()
    calibration: CalibrationResult | None = None
    coverage: Coverage | None = None
    probes: tuple[Probe, ...] = ()
    published: tuple[PublishedTask, ...] = ()
    cost: Cost = field(default_factory=Cost)
    pays_until: int = 0
    better_likelihood: str = ""
    leaks: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    folds: int = 0
    tested_groups: str = ""
    schema: int = SCHEMA


def format_interval(interval: Estimate | Difference) -> str:
    """The ends of an interval, x 100."""
    return f"{percent(interval.low)} to {percent(interval.high)}"
