"""The dataclasses of the data report."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

NUM_BINS = 20
QUANTILES = (5, 25, 50, 75, 95, 99)
"""The quantiles of lengths that a report has, in percent."""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Histogram of labels: exactly 0, exactly 1, and 20 bins in between.

    Bin i counts labels of at least i / 20 and less than (i + 1) / 20, without exact 0 and 1. `mean` is None if there is
    no candidate.
    """

    zero: int
    bins: tuple[int, ...]
    one: int
    mean: float | None

    @property
    def count(self) -> int:
        """Number of candidates."""
        return self.zero + sum(self.bins) + self.one

    @property
    def bin_counts(self) -> tuple[int, ...]:
        """The numbers of labels that are exactly 0, in each bin, and exactly 1, in this order."""
        return (self.zero, *self.bins, self.one)


@dataclass(frozen=True, kw_only=True)
class PoolStatistics:
    """Counts and means over instances, which show how much a selector can gain; means are None without instances.

    A pool is the selectable candidates of an instance (`llm` or `choice`, status ok or truncated). `num_pools` counts
    the instances with a pool, and all means except `ties` are over those. Equal responses count as one distinct
    response, with the label of the first.

    random       mean label of the pool: the expected label of a random pick
    oracle       highest label of the pool: the label of the best pick
    no_signal    share of pools whose labels are all equal
    best_shared  share of pools in which several distinct responses have the highest label
    ties         share of the pairs of distinct responses of a pool that have equal labels, mean over the
                 `num_multi_response_pools` pools that have at least two distinct responses
    effective    exp of the entropy of the pool's responses: the effective number of distinct responses
    """

    instances: int
    candidates: int
    selectable: int
    distinct: int
    num_pools: Annotated[int, Field(serialization_alias="pools")]
    num_multi_response_pools: Annotated[int, Field(serialization_alias="comparable")]
    random: float | None
    oracle: float | None
    no_signal: float | None
    best_shared: float | None
    ties: float | None
    effective: float | None


@dataclass(frozen=True, kw_only=True)
class GeneratorSummary:
    """An LLM with one decoding: the labels of its responses, and how many of them are blank."""

    generator: str
    decoding: str
    num_blank: Annotated[int, Field(serialization_alias="empty")]
    labels: Labels

    @property
    def name(self) -> str:
        """Generator and decoding, for display."""
        return ", ".join(filter(None, (self.generator or "(unnamed)", self.decoding)))


@dataclass(frozen=True, kw_only=True)
class LengthSummary:
    """Quantiles of lengths: "5" is the smallest length that at least 5% of the texts do not exceed.

    Exact up to 2,047; above, a quantile may be up to 0.1% too small. "max" is exact.
    """

    num_texts: Annotated[int, Field(serialization_alias="texts")]
    quantiles: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """Number of values, of distinct values, and of distinct values that are in more than one split.

    Compared by 64-bit hashes: among a million values, the probability of any false match is 1 in 37 million.
    """

    values: int
    distinct: int
    in_several_splits: int

    @property
    def repeats(self) -> int:
        """Number of values that equal an earlier one."""
        return self.values - self.distinct


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """Statistics of a folder of annotated instances; labels are 0 to 1.

    `splits` and `tasks` are sorted by size, largest first. `sources` maps `reference`, `choice`, `mismatch` and `llm`
    to their labels; `statuses` counts LLM responses. `characters` and `words` (separated by white space) map
    "instruction", "reference" and "response" (of an LLM, or a choice) to lengths. `num_blank` counts blank responses.
    Two `instructions` count as equal if their `prompt_hash` is equal. `invisible_to_rouge_l` counts the instances whose
    references have no character of [a-z0-9], for which Rouge-L is always 0; `partly_invisible_to_rouge_l` counts those
    with a reference or LLM response that has other letters and digits too, which Rouge-L ignores.
    """

    metric: str
    total: PoolStatistics
    splits: Mapping[str, PoolStatistics]
    tasks: Mapping[str, PoolStatistics]
    labels: Labels
    sources: Mapping[str, Labels]
    generators: tuple[GeneratorSummary, ...]
    statuses: Mapping[str, int]
    characters: Mapping[str, LengthSummary]
    words: Mapping[str, LengthSummary]
    responses: int
    num_blank: Annotated[int, Field(serialization_alias="empty")]
    groups: Repetition
    instructions: Repetition
    invisible_to_rouge_l: int
    partly_invisible_to_rouge_l: int

    @property
    def all_tied(self) -> bool:
        """Whether every instance's selectable responses have equal labels."""
        return self.total.no_signal == 1

    @property
    def uses_rouge_l(self) -> bool:
        """Whether the metric is Rouge-L, alone or in a mixture."""
        return any(term.split("*")[-1].strip() == "rougeL" for term in self.metric.split("+"))
