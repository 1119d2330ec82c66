"""The scale plan: rows, tokens, GPU-hours, storage and wall-clock of a pretraining, computed from measured speeds.

`cappy plan` prints it. Volumes are arithmetic over a mixture's facts (`volumes`), speeds come from the calibration
file that `benchmarks/calibration.py` writes (`calibration`), work is counted in floating point operations of published
shapes (`shapes`). A speed that nobody measured is never made up: it is a share of the data sheet's peak that the user
states, and the plan says so.
"""

import re
from collections.abc import Mapping, Sequence

from cappy.errors import ConfigError, shown
from cappy.plan.calibration import Calibration, read_calibration
from cappy.plan.costs import HARDWARE, Terms, works
from cappy.plan.shapes import GENERATORS, SCORERS, shape_of
from cappy.plan.table import Plan, text, to_values
from cappy.plan.volumes import EVALUATED_ON, mixture_volumes

__all__ = [
    "EVALUATED_ON",
    "GENERATORS",
    "HARDWARE",
    "SCORERS",
    "Calibration",
    "Plan",
    "Terms",
    "make_plan",
    "read_calibration",
    "samples_of",
    "text",
    "to_values",
]

MOST_DEVICES = 256
PUBLISHED_SAMPLES = 5
"""Responses of each generator for an open-ended prompt, as the paper's (method recalled, not published code)."""


def make_plan(
    mixture: str,
    generators: Sequence[str],
    hardware: str,
    devices: Sequence[int],
    calibration: Calibration,
    terms: Terms,
    *,
    price: float | None = None,
) -> Plan:
    """The plan of a pretraining; ConfigError for an unknown name and for a speed that nobody measured or assumed."""
    wrong = next((number for number in devices if not 1 <= number <= MOST_DEVICES), None)
    if wrong is not None:
        raise ConfigError(f"plan: --gpus: {wrong} is out of range; give 1 to {MOST_DEVICES}, repeated to compare")
    volumes = mixture_volumes(mixture, samples_of(generators), calibration)
    return Plan(
        mixture=mixture,
        hardware=hardware,
        devices=tuple(dict.fromkeys(devices)),
        price=price,
        terms=terms,
        volumes=volumes,
        works=tuple(works(volumes, calibration, hardware, terms, texts=mixture)),
        machines=tuple(dict.fromkeys(one.machine for one in calibration.measurements)),
    )


def samples_of(generators: Sequence[str]) -> Mapping[str, int]:
    """Candidates for an open-ended prompt by generator, from NAME or NAME:NUMBER; ConfigError says what is wrong."""
    found: dict[str, int] = {}
    for one in generators:
        match = re.fullmatch(r"([^:]+)(?::([1-9][0-9]{0,3}))?", one)
        if match is None:
            raise ConfigError(f"plan: --generators: {shown(one)} is no NAME or NAME:NUMBER; write as bart0:5")
        shape_of(match[1], GENERATORS, "generators")
        if match[1] in found:
            raise ConfigError(f"plan: --generators: {shown(match[1])} stands twice; give its number once")
        found[match[1]] = int(match[2] or PUBLISHED_SAMPLES)
    return found
