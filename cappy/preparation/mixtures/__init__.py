"""Loads the mixtures of the paper: their datasets, templates and splits. `plan` counts the rows that they make.

    t0           the training data of T0, and later of Cappy: 38 subsets, 313 templates
    heldout      the eleven tasks that Cappy was evaluated on without training, COPA and HellaSwag
    bigbench45   the 45 generation tasks of BIG-bench that Cappy was adapted to

The data is in `data/`. `sources.json` is written by hand and says where each subset is on the Hugging Face hub. It was
written without access to the hub, so every entry has `verified: false` and the public text that it relies on. A
`revision` is a branch; the manifest of prepared data records the commit that it resolved to. The other files are
generated from sources.json, PromptSource's templates and two published tables:

    python -m cappy.preparation.mixtures --templates FOLDER --published FOLDER
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from importlib.resources import files
from typing import Annotated, Required, TypedDict

from pydantic import Field, TypeAdapter

from cappy.errors import ConfigError, quote

NAMES = ("t0", "heldout", "bigbench45")
"""The names of the mixtures."""

CONVERTED_BRANCH = "refs/convert/parquet"
"""The branch where the hub stores a repository's data converted to Parquet, including the data of loading scripts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateFacts:
    """The facts about a template that a plan needs.

    `num_choices` is None for an open-ended template, which has no answer choices. Where choices come from the row, it
    is the average over the dataset and need not be an integer.
    """

    name: str
    num_choices: int | float | None
    original_task: bool

    @property
    def has_choices(self) -> bool:
        """Whether the response is one of a closed set."""
        return self.num_choices is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Subset:
    """One dataset of a mixture.

    `dataset` is its folder in PromptSource. `configuration` is None if the repository has only one. `rows` maps the
    splits that the mixture uses to their sizes, None if unpublished. `manual` says how to get data that cannot be
    loaded, and is empty otherwise. `verified` is true once it has been loaded from the hub; until then `evidence` is
    the source of its facts. `choices_source` says where the numbers of choices of its templates come from.
    `pinned_commit` is a commit that public code pins.
    """

    name: str
    dataset: str
    repository: str
    configuration: str | None
    revision: str
    rows: Mapping[str, int | None]
    verified: bool
    templates: tuple[TemplateFacts, ...] = ()
    manual: str = ""
    notes: str = ""
    choices_source: str = ""
    evidence: str = ""
    pinned_commit: Annotated[str, Field(alias="commit_seen")] = ""

    @property
    def splits(self) -> tuple[str, ...]:
        """The hub's names of the splits that the mixture uses."""
        return tuple(self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """The datasets of a mixture.

    `template_version` is the PromptSource version whose templates are listed. `samples` is the number of responses that
    an LLM samples per prompt.
    """

    name: str
    template_version: str
    samples: int
    subsets: tuple[Subset, ...] = field(default_factory=tuple)


def load_mixture(name: str) -> Mixture:
    """Loads a mixture; raises ConfigError for an unknown name."""
    if name not in NAMES:
        raise ConfigError(f"mixture: unknown mixture {quote(name)}; choose one of {', '.join(NAMES)}")
    return from_json(read_data(f"{name}.json"))


def select_subsets(mixture: Mixture, patterns: Sequence[str]) -> Mixture:
    """The mixture with the subsets whose names match a pattern; raises ConfigError for a pattern without a match."""
    names = [subset.name for subset in mixture.subsets]
    unknown = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
    if unknown:
        remedy = f"choose one of {', '.join(names)}, or a pattern such as 'super_glue/*'"
        raise ConfigError(f"preparation: --subsets: no dataset of {mixture.name} matches {quote(unknown[0])}; {remedy}")
    selected = [s for s in mixture.subsets if not patterns or any(fnmatchcase(s.name, pattern) for pattern in patterns)]
    return replace(mixture, subsets=tuple(selected))


def from_json(text: str) -> Mixture:
    """Parses the JSON of a mixture; raises pydantic.ValidationError for a missing field or a wrong type."""
    return TypeAdapter(Mixture).validate_json(text, strict=True)


class SubsetValues(TypedDict, total=False):
    """A `Subset` as JSON values, and as an entry of sources.json; an absent key has its default.

    `choices_per_row` is only in sources.json, `plan` only in the JSON of a plan.
    """

    name: Required[str]
    dataset: Required[str]
    repository: Required[str]
    configuration: Required[str | None]
    revision: Required[str]
    rows: Mapping[str, int | None]
    verified: Required[bool]
    templates: Sequence[Mapping[str, object]]
    manual: str
    notes: str
    choices_source: str
    evidence: str
    commit_seen: str
    choices_per_row: float
    plan: Sequence[Mapping[str, object]]


class MixtureValues(TypedDict):
    """A `Mixture` as JSON values."""

    name: str
    template_version: str
    samples: int
    subsets: list[SubsetValues]


def to_values(mixture: Mixture) -> MixtureValues:
    """A mixture as JSON values, without fields that have their default value."""
    values: MixtureValues = TypeAdapter(Mixture).dump_python(mixture, mode="json", by_alias=True, exclude_defaults=True)
    return values


def read_data(name: str) -> str:
    """The text of a packaged data file."""
    return (files(__package__) / "data" / name).read_text(encoding="utf-8")
