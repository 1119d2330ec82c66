"""What was measured: the file that `benchmarks/calibration.py` writes, and what a plan reads of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

import cappy
from cappy.errors import ConfigError

DEFAULT = Path(cappy.__file__).parents[1] / "benchmarks/results/calibration.json"
"""Where the measurements of this project's own machine lie in a clone."""

REMEDY = "write it with python benchmarks/calibration.py, or name another with --calibration"

Step = Literal["preparation", "sampling", "annotation", "tokenization", "pretraining", "evaluation"]
Unit = Literal["prompts/s", "pairs/s", "FLOP/s", "seconds to start", "bytes/prompt", "bytes/pair", "bytes/weight"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Lengths of one kind of a subset's prompts, in tokens of the scorer, as means over `prompts` of them.

    Prompts are cut at what a generator reads, responses at what it writes, pairs at what the scorer reads; `_squared`
    are means of squares.
    """

    subset: str
    kind: Literal["choices", "open-ended"]
    prompts: int
    prompt_tokens: float
    prompt_squared: float
    response_tokens: float
    pair_tokens: float
    pair_squared: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One number: of a `step` on a `hardware`, `of` a shape or the texts of a mixture, on one device or core.

    `told` holds what it was computed from and other ways to say it (tokens and pairs per second, mean lengths, the
    share of the data sheet's peak where there is one), `load` the machine's load average before it.
    """

    step: Step
    hardware: str
    of: str
    unit: Unit
    value: float
    date: str
    machine: str
    load: float
    told: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Lengths of the texts of each mixture, and the measurements."""

    benchmark: Literal["calibration"]
    texts: Mapping[str, tuple[Texts, ...]]
    measurements: tuple[Measurement, ...]

    def texts_of(self, mixture: str) -> tuple[Texts, ...]:
        """Lengths of the texts of a mixture; ConfigError where none were measured."""
        if not self.texts.get(mixture):
            raise ConfigError(f"plan: the calibration has no lengths of the texts of {mixture}; {REMEDY}")
        return self.texts[mixture]

    def find(self, step: Step, unit: Unit, *, hardware: str, of: str) -> Measurement | None:
        """The measurement, or None where there is none."""
        asked = (step, unit, hardware, of)
        return next((m for m in self.measurements if (m.step, m.unit, m.hardware, m.of) == asked), None)

    def need(self, step: Step, unit: Unit, *, hardware: str, of: str) -> Measurement:
        """The measurement; ConfigError says which are missing and which there are."""
        found = self.find(step, unit, hardware=hardware, of=of)
        if found is None:
            others = [m.of for m in self.measurements if (m.step, m.unit, m.hardware) == (step, unit, hardware)]
            there = f"measured on {hardware}: {', '.join(others) or 'nothing'}"
            raise ConfigError(f"plan: {step} of {of}, in {unit}, was not measured on {hardware} ({there}); {REMEDY}")
        return found


def read_calibration(path: Path) -> Calibration:
    """The calibration in a file; ConfigError where it is missing, damaged or holds a number that cannot be."""
    if not path.is_file():
        raise ConfigError(f"plan: {path}: no such calibration; {REMEDY}")
    try:
        found = TypeAdapter(Calibration).validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"plan: {path}: is no calibration ({where or 'file'}: {first['msg']}); {REMEDY}") from error
    wrong = next((m for m in found.measurements if not 0 < m.value < float("inf")), None)
    if wrong:
        raise ConfigError(f"plan: {path}: {wrong.step} of {wrong.of} is {wrong.value} {wrong.unit}; {REMEDY}")
    return found
