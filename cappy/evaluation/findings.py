"""The results of an evaluation as dataclasses; all labels and scores are on a scale of 0 to 1."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from cappy.pages import percent

ReportValues = Mapping[str, Any]
"""The values of a report.json, or of a part of it, unconverted: written by this version or another one."""
SCHEMA = 4
"""Raised when a field changes its meaning or is removed, not when one is added."""
OUT_OF_FOLD = "out_of_fold.json"
"""File with the out-of-fold scores, registered with the scorer; see `cappy.evaluation.crossfit`."""
LEVEL = 0.95
"""Confidence level of every interval."""
MIN_GROUPS = 30
"""With fewer groups, no interval tried in benchmarks/intervals.py has its nominal coverage on skewed differences."""
MAX_GROUPS_FACTOR = 20
"""A user can be expected to collect up to this many times the present number of groups."""


@dataclass(frozen=True, kw_only=True)
class MeanEstimate:
    """A mean with its 95% interval, on the metric's scale of 0 to 1."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A paired difference of two means with its 95% interval, and the values that give its interval at another level.

    `p_value` is two-sided, against a true difference of 0. `standard_error`, the `skewness` of the mean and
    `degrees_of_freedom` are those of `cappy.evaluation.statistics`; the standard error is None for a single group.
    """

    difference: float
    low: float
    high: float
    p_value: float
    standard_error: float | None
    skewness: float
    degrees_of_freedom: Annotated[float, Field(alias="freedom")]
    groups: int


@dataclass(frozen=True, kw_only=True)
class Power:
    """The statistical power of a comparison: which difference its groups can detect, and how many groups its own needs.

    `smallest` is the difference whose 95% interval excludes 0 with a probability of 80%; `groups_needed` is None if the
    observed difference is 0.
    """

    groups: int
    smallest: float
    groups_needed: int | None

    @property
    def within_reach(self) -> bool:
        """Whether a user can be expected to collect as many groups as the difference needs."""
        return self.groups_needed is not None and self.groups_needed <= MAX_GROUPS_FACTOR * self.groups


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One selector: its mean label, its gain over random choice, and what was fitted on held-out instances (`detail`).

    `ties` counts the instances where candidates with different labels share the highest value; their mean label is
    used.
    """

    estimate: MeanEstimate
    gain: Difference
    ties: int = 0
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class TaskRow:
    """One task: the mean label of each selector, and a gain over random choice.

    `gain` is that of the scorer, or of MBR if there is no scorer.
    `kind` is "choice" if every instance is a choice from a closed set; `templates` then has the accuracy of the same
    selector by template. `against_champion` is the difference between scorer and champion, if there is one.
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
    """Unweighted means over tasks, and the mean of the gains in `TaskRow`; intervals are over tasks."""

    tasks: int
    means: Mapping[str, MeanEstimate]
    gain: Difference


@dataclass(frozen=True, kw_only=True)
class Pick:
    """The response that a selector picked in an example, with its label."""

    selector: str
    response: str
    label: float


@dataclass(frozen=True, kw_only=True)
class RatedCandidate:
    """A candidate with its label, and the values of the selector, the scorer and MBR; None if one is unavailable."""

    response: str
    label: float
    value: float | None = None
    score: float | None = None
    mbr: float | None = None


@dataclass(frozen=True, kw_only=True)
class Example:
    """An instance shown in the report, with the picks of the selectors and its candidates, best value first.

    `left_out` is the number of candidates that are not shown.
    """

    instance_id: str
    task: str
    instruction: str
    references: tuple[str, ...]
    picks: tuple[Pick, ...]
    candidates: tuple[RatedCandidate, ...] = ()
    left_out: int = 0


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Picks with neighbouring scores: mean score, mean label and number of picks."""

    score: float
    label: float
    count: int


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """How far the scores of the selector's picks are from their labels.

    `ece` is the expected calibration error: the mean distance between a bin's mean score and mean label, weighted by
    its size (Naeini, Cooper and Hauskrecht, 2015), here with bins of equal size. `brier` is the mean squared
    difference of score and label (Brier, 1950).
    """

    ece: float
    brier: float
    bins: tuple[Bin, ...]


@dataclass(frozen=True, kw_only=True)
class CalibrationResult:
    """Reliability of raw and calibrated scores of picks; the calibration is fitted on `fitted_on` held-out groups.

    `spread` is the median difference between an instance's highest and lowest score; None if not measured.
    """

    raw: Reliability
    calibrated: Reliability | None = None
    fitted_on: int = 0
    spread: float | None = None


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Mean label of the answered picks when only the instances with the highest scores are answered.

    `quality[i]` is the mean label at the share `coverage[i]`, `random` the mean label of a random subset of any size.
    """

    coverage: tuple[float, ...]
    quality: tuple[float, ...]
    random: float


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A number that measures a known weakness of scorers, and its meaning in a sentence."""

    name: str
    value: float
    meaning: str


@dataclass(frozen=True, kw_only=True)
class ScoringCost:
    """Cost per candidate: tokens that the LLM generated and seconds that the scorer took; None if not measured."""

    tokens: float | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class PublishedTask:
    """A task with published results: our mean label and the published numbers by model, x 100, and their source."""

    task: str
    ours: float
    numbers: Mapping[str, float]
    source: str


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All results of an evaluation; numbers are on the metric's scale of 0 to 1.

    `facts` are counts of instances, groups and candidates. `unavailable` has the reason why a selector was not
    evaluated. `curve` has, by selector, the expected label of its pick among n candidates, for n from 1. `comparisons`
    has paired differences by the names of both selectors, such as "selector-random". "selector-likelihood"
    compares with `better_likelihood_selector`, the likelihood selector that is better on the reported split itself;
    that choice favours the baseline. `adjusted` has the p-values of the comparisons after Holm's correction. `averages`
    are unweighted means over tasks. `leaks` counts, by scorer, the reported instances that it saw in training or early
    stopping, directly or as another template of the same row. `num_worthwhile_candidates` is the number of candidates
    beyond which one more adds less than 0.001; 0 without a scorer. `folds` is above 0 if the report was cross-fitted:
    it is then about the recipe, not about the scorer in `versions`. `selector_hashes` has the sha256 of each
    selector.json, "" without one. `tested_groups` is a sketch of the reported groups
    (`cappy.records.overlap`), from which the promotion check (`cappy.registry.gate`) counts how often they were used.
    """

    metric: str
    split: str
    seed: int
    facts: Mapping[str, int]
    selectors: Mapping[str, TableRow]
    unavailable: Mapping[str, str]
    comparisons: Mapping[str, Difference]
    curve: Mapping[str, tuple[MeanEstimate, ...]]
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
    cost: ScoringCost = field(default_factory=ScoringCost)
    num_worthwhile_candidates: Annotated[int, Field(alias="pays_until")] = 0
    better_likelihood_selector: Annotated[str, Field(alias="better_likelihood")] = ""
    leaks: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    selector_hashes: Mapping[str, str] = field(default_factory=dict)
    folds: int = 0
    tested_groups: str = ""
    schema: int = SCHEMA


def format_interval(interval: MeanEstimate | Difference) -> str:
    """The ends of an interval, x 100, as text."""
    return f"{percent(interval.low)} to {percent(interval.high)}"
