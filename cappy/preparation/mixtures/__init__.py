"""Mixtures by name: which datasets, templates and splits they hold. `plan` says how many rows come of them.

    t0           what T0 was trained on, and Cappy after it: 38 subsets, 313 templates
    heldout      the eleven tasks that Cappy was evaluated on without training, COPA and HellaSwag
    bigbench45   the 45 generation tasks of BIG-bench that Cappy was adapted to

The facts lie in `data/`. `sources.json` is written by hand: where each subset lies at the Hugging Face hub today. The
hub could not be reached where it was written, so every entry says `verified: false` and what public text it rests on.
A `revision` is a branch, never a commit that nobody looked up: the manifest of the prepared data records the commit
that it resolved to. The other files are made of it, of PromptSource's templates and of two published tables:

    python -m cappy.preparation.mixtures --templates FOLDER --published FOLDER
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from importlib.resources import files
from typing import Required, TypedDict

from pydantic import TypeAdapter

from cappy.errors import ConfigError, quote

NAMES = ("t0", "heldout", "bigbench45")
"""The mixtures there are."""

CONVERTED = "refs/convert/parquet"
"""The branch to which the hub itself converts the data of a repository, scripts included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateFacts:
    """What a plan must know of a template.

    `num_choices` is None where the template has no answer choices, which makes it open-ended. Where choices come from
    the row, it is the dataset's average and need not be whole.
    """

    name: str
    num_choices: int | float | None
    original_task: bool

    @property
    def has_choices(self) -> bool:
        """Whether a response is one of a closed set."""
        return self.num_choices is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Subset:
    """One dataset of a mixture.

    `dataset` is its folder in PromptSource. `configuration` is None where the repository has only one. `rows` maps the
    splits that the mixture uses to their sizes, None where nobody published it. `manual` says what a person must do
    where the data cannot be loaded, and is empty everywhere else. `verified` is true once somebody has loaded it from
    the hub, `evidence` what the facts rest on until then, `commit_seen` a commit that public code pins.
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
    commit_seen: str = ""

    @property
    def splits(self) -> tuple[str, ...]:
        """The hub's names of the splits that the mixture uses."""
        return tuple(self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Subsets, the version of the templates that are counted, and how many responses an LLM samples for each prompt."""

    name: str
    template_version: str
    samples: int
    subsets: tuple[Subset, ...] = field(default_factory=tuple)


def load_mixture(name: str) -> Mixture:
    """The mixture of this name; ConfigError lists the names for an unknown one."""
    if name not in NAMES:
        raise ConfigError(f"mixture: unknown mixture {quote(name)}; choose one of {', '.join(NAMES)}")
    return from_json(read_data(f"{name}.json"))


def select_subsets(mixture: Mixture, patterns: Sequence[str]) -> Mixture:
    """The mixture with the subsets whose names match a pattern; ConfigError for a pattern that matches none."""
    names = [subset.name for subset in mixture.subsets]
    unknown = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
    if unknown:
        remedy = f"choose one of {', '.join(names)}, or a pattern such as 'super_glue/*'"
        raise ConfigError(f"preparation: --subsets: {mixture.name} has no {quote(unknown[0])}; {remedy}")
    kept = [s for s in mixture.subsets if not patterns or any(fnmatchcase(s.name, pattern) for pattern in patterns)]
    return replace(mixture, subsets=tuple(kept))


def from_json(text: str) -> Mixture:
    """The mixture in a data file; pydantic.ValidationError where a field is missing or of another type."""
    return TypeAdapter(Mixture).validate_json(text, strict=True)


class SubsetValues(TypedDict, total=False):
    """A `Subset` as JSON values, and as an entry of sources.json; what is left out is at its default.

    `choices_per_row` stands in sources.json alone, `plan` in the JSON of a plan.
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
    """A mixture as JSON values, fields at their default left out."""
    values: MixtureValues = TypeAdapter(Mixture).dump_python(mixture, mode="json", exclude_defaults=True)
    return values


def read_data(name: str) -> str:
    """A packaged data file."""
    return (files(__package__) / "data" / name).read_text(encoding="utf-8")
