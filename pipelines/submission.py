"""From the settings of each step to the arguments of a pipeline run: validated, aliases resolved, fingerprinted."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pipelines
from cappy.config import encode
from cappy.errors import ConfigError, shown
from pipelines.champion import resolved, tracking_uri
from pipelines.fingerprints import fingerprints

TYPED: Mapping[str, tuple[str, ...]] = {
    "preparation": ("source", "seed"),
    "sampling": ("generator", "strategy", "seed"),
    "annotation": ("metric",),
    "pretraining": ("seed",),
    "finetuning": ("scorer", "seed"),
    "evaluation": ("champion", "metric", "seed"),
    "registration": ("name",),
    "promotion": ("margin",),
    "deployment": (),
}
"""Step -> the settings that are parameters of its component; all others travel encoded."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A run that is ready to be handed to an orchestrator."""

    pipeline: str
    arguments: Mapping[str, Any]
    fingerprints: Mapping[str, str]
    tracking_uri: str = ""


def prepare(pipeline: str, steps: Mapping[str, Mapping[str, Any]], *, work: Path) -> Submission:
    """The submission of a pipeline with these settings per step; ConfigError if a setting is wrong.

    Nothing that moves is left in it: aliases have become versions, and every file stands in a fingerprint.
    """
    if pipeline not in pipelines.PIPELINES:
        raise ConfigError(f"{shown(pipeline)}: no such pipeline; there are {', '.join(pipelines.PIPELINES)}")
    if unknown := set(steps) - set(pipelines.STEPS[pipeline]):
        raise ConfigError(f"{pipeline}: has no step {', '.join(sorted(unknown))}")
    shared = {"work": str(work.absolute())}
    settings = resolved({step: {**steps.get(step, {}), **shared} for step in pipelines.STEPS[pipeline]}, work=work)
    found = fingerprints(settings, tracking_uri=tracking_uri(settings))
    return Submission(
        pipeline=pipeline,
        arguments=arguments(settings, found),
        fingerprints=found,
        tracking_uri=tracking_uri(settings),
    )


def arguments(settings: Mapping[str, Mapping[str, Any]], found: Mapping[str, str]) -> dict[str, Any]:
    """The parameters of the pipeline function."""
    values: dict[str, Any] = {}
    for step, chosen in settings.items():
        for name in TYPED[step]:
            if name in chosen and values.setdefault(name, chosen[name]) != chosen[name]:
                both = f"{shown(values[name])} and {shown(chosen[name])}"
                raise ConfigError(f"{step}: --{name} is one for the whole pipeline, got {both}")
        values[f"{step}_settings"] = encode({key: chosen[key] for key in chosen if key not in TYPED[step]})
        values[f"{step}_fingerprint"] = found[step]
    tracking = {
        key: settings["registration"][key] for key in ("work", "tracking_uri") if key in settings["registration"]
    }
    return {**values, "tracking_settings": encode(tracking), "fingerprints": json.dumps(found)}
