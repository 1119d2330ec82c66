"""The data report: what a folder of annotated instances holds, as a record."""

from collections.abc import Mapping
from dataclasses import dataclass

NUM_BINS = 20
QUANTILES = (5, 25, 50, 75, 95, 99)
"""In percent."""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """How many candidates have which label: exactly 0, exactly 1, and between them by bin.

    Bin i of the 20 holds labels of at least i / 20 and less than (i + 1) / 20, exact 0 and 1 left out. `mean` is None
    where there is no candidate.
    """

    zero: int
    bins: tuple[int, ...]
    one: int
    mean: float | None

    @property
    def count(self) -> int:
        """Candidates in all."""
        return self.zero + sum(self.bins) + self.one

    @property
    def cells(self) -> tuple[int, ...]:
        """Exact 0, the bins, exact 1, in order."""
        return (self.zero, *self.bins, self.one)


@dataclass(frozen=True, kw_only=True)
class Pools:
    """Instances and what a selector finds in them; the means are over instances and None where there is none.

    A pool is the selectable candidates of an instance (`llm` or `choice`, status ok or truncated). `pools` counts the
    instances that have one, and all means but `ties` are over those. Where different responses are counted, equal ones
    are one response, with the label that it has first.

    random       mean label of the pool: what a random pick is worth
    oracle       highest label of the pool: what the best pick is worth
    no_signal    share of pools whose labels are all equal
    best_shared  share of pools whose highest label several different responses have
    ties         share of the pairs of different responses that have equal labels, by pool, and its mean over the
                 `comparable` pools, which have two different responses or more
    effective    exp of the entropy of the pool's responses: it varies as much as this many equally frequent ones
    """

    instances: int
    candidates: int
    selectable: int
    distinct: int
    pools: int
    comparable: int
    random: float | None
    oracle: float | None
    no_signal: float | None
    best_shared: float | None
    ties: float | None
    effective: float | None


@dataclass(frozen=True, kw_only=True)
class Generator:
    """An LLM with one way of decoding: its responses, how many of them are blank, their labels."""

    generator: str
    decoding: str
    empty: int
    labels: Labels

    @property
    def name(self) -> str:
        """Both, for a person."""
        return ", ".join(filter(None, (self.generator or "(unnamed)", self.decoding)))


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths of texts: the quantile "5" is the least length that at least 5% of the texts do not exceed.

    Exact up to 2,047; above it a quantile may be up to 0.1% too small. "max" is exact.
    """

    texts: int
    quantiles: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """Values, how many different ones there are, and how many of those stand in more than one split.

    Compared by 64 bits of a hash: among a million the chance of any false match is 1 in 37 million.
    """

    values: int
    distinct: int
    in_several_splits: int

    @property
    def repeats(self) -> int:
        """Values that an earlier one equals."""
        return self.values - self.distinct


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """Everything that a folder of annotated instances tells about itself; labels are 0 to 1.

    `splits` and `tasks` go by size, largest first; `sources` maps `reference`, `choice`, `mismatch` and `llm` to their
    labels; `statuses` counts LLM responses. `characters` and `words` (runs between white space) map "instruction",
    "reference" and "response" (of an LLM, or a choice) to lengths. `empty` counts responses without a word.
    `instructions` are equal where `prompt_hash` is. `invisible_to_rouge_l` counts the instances none of whose
    references has a character of [a-z0-9]: Rouge-L gives them 0 throughout; `partly_invisible_to_rouge_l` counts those
    with a reference or LLM response of whose letters and digits it sees only some.
    """

    metric: str
    total: Pools
    splits: Mapping[str, Pools]
    tasks: Mapping[str, Pools]
    labels: Labels
    sources: Mapping[str, Labels]
    generators: tuple[Generator, ...]
    statuses: Mapping[str, int]
    characters: Mapping[str, Lengths]
    words: Mapping[str, Lengths]
    responses: int
    empty: int
    groups: Repetition
    instructions: Repetition
    invisible_to_rouge_l: int
    partly_invisible_to_rouge_l: int

    @property
    def all_tied(self) -> bool:
        """Whether every instance's selectable responses have equal labels."""
        return self.total.no_signal == 1

    @property
    def by_rouge_l(self) -> bool:
        """Whether the metric is Rouge-L, alone or in a mixture."""
        return any(term.split("*")[-1].strip() == "rougeL" for term in self.metric.split("+"))
