"""From the settings of each step to the arguments of a pipeline run: validated, aliases resolved, fingerprinted."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cappy.config import encode
from cappy.errors import ConfigError, shown
from cappy.redaction import has_secret
from cappy.steps import STEP_SPECS
from pipelines.definitions import MAX_SHARDS, PIPELINES, shards_of
from pipelines.fingerprints import fingerprints, resolved


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A run that is ready to be handed to an orchestrator; `fingerprints` by step, and by shard of a sharded one."""

    pipeline: str
    arguments: Mapping[str, Any]
    fingerprints: Mapping[str, str]
    tracking_uri: str = ""
    shards: int = 1


def prepare(
    pipeline: str,
    steps: Mapping[str, Mapping[str, Any]],
    *,
    work: Path,
    shards: int = 1,
    tracking_uri: str = "",
    revision: str = "",
    registry: str = "",
    images: Mapping[str, str] | None = None,
) -> Submission:
    """The submission of a pipeline with these settings per step; ConfigError if a setting is wrong.

    Nothing that moves is left in it: aliases have become versions, and every file stands in a fingerprint. `revision`
    stands for content that this machine cannot see, such as files of a cluster's volume; `registry` is MLflow's address
    from here, where the steps' own `tracking_uri` leads there from inside a cluster alone; `images` are those of steps
    that run in one, by what pins them.
    """
    if pipeline not in PIPELINES:
        raise ConfigError(f"{shown(pipeline)}: no such pipeline; there are {', '.join(PIPELINES)}")
    if not 1 <= shards <= MAX_SHARDS:
        raise ConfigError(f"{pipeline}: {shards} shards; give 1 to {MAX_SHARDS}")
    names = PIPELINES[pipeline].steps_in(shards)
    if unknown := set(steps) - set(names):
        raise ConfigError(f"{pipeline}: has no step {', '.join(sorted(unknown))}")
    refuse_placed(pipeline, steps)
    shared = {"work": str(work.absolute())}
    address = str(steps.get("registration", {}).get("tracking_uri", "")) or tracking_uri
    steps = {step: _without_secret(step, values, address) for step, values in steps.items()}
    placed = {step: {**steps.get(step, {}), **shared} for step in names}
    pinned: dict[str, Any] = {"tracking_uri": registry or address, "revision": revision, "images": images}
    settings = resolved(placed, work=work, **pinned)
    found = fingerprints(settings, **pinned)
    told = by_shard(found, shards)
    return Submission(
        pipeline=pipeline,
        arguments=arguments(settings, found, told, {**shared, "tracking_uri": "" if has_secret(address) else address}),
        fingerprints=told,
        tracking_uri=address,
        shards=shards,
    )


def _without_secret(step: str, values: Mapping[str, Any], address: str) -> Mapping[str, Any]:
    """The settings without an address of MLflow that holds a password: arguments stand in many places.

    The run's own reaches the steps by MLFLOW_TRACKING_URI; ConfigError for another one, which nothing would bring.
    """
    own = str(values.get("tracking_uri", ""))
    if not has_secret(own):
        return values
    if own != address:
        remedy = "give one address for all steps: --tracking-uri, or MLFLOW_TRACKING_URI"
        raise ConfigError(f"{step}: --tracking-uri: holds a password, and is not that of the run; {remedy}")
    return {**values, "tracking_uri": ""}


def refuse_placed(pipeline: str, steps: Mapping[str, Mapping[str, Any]]) -> None:
    """ConfigError for a setting that the pipeline fills: it would be passed over in silence."""
    for step, values in steps.items():
        for name in sorted({*STEP_SPECS[step].artifacts, "work"} & set(values)):
            # Evaluation's scorer is an artifact in the pipelines that train one, and named in the one that does not.
            if (step, name, pipeline) != ("evaluation", "scorer", "evaluate"):
                raise ConfigError(f"{step}: --{name} is what the pipeline gives it; leave it out of settings and --set")
        if STEP_SPECS[step].sharded and values.get("shard"):
            raise ConfigError(f"{step}: --shard is what the pipeline gives each; say how many: shards, or --shards")


def by_shard(found: Mapping[str, str], shards: int) -> dict[str, str]:
    """The fingerprints under which steps and shards leave their records: `sampling 0/4` and so on in place of a step.

    Shards stand one after the other, each with its steps in order, which is how they run.
    """
    if shards == 1:
        return dict(found)
    sharded = [step for step in found if STEP_SPECS[step].sharded]
    spread = {f"{step} {shard}": f"{found[step]}-{shard}" for shard in shards_of(shards) for step in sharded}
    before = list(found)[: list(found).index(sharded[0])]
    after = [step for step in found if step not in (*before, *sharded)]
    return {**{step: found[step] for step in before}, **spread, **{step: found[step] for step in after}}


def arguments(
    settings: Mapping[str, Mapping[str, Any]],
    found: Mapping[str, str],
    told: Mapping[str, str],
    tracking: Mapping[str, str],
) -> dict[str, Any]:
    """The parameters of the pipeline function; shards are told which they are by the pipeline itself."""
    values: dict[str, Any] = {}
    for step, chosen in settings.items():
        for name, parameter in STEP_SPECS[step].parameters.items():
            if name in chosen and values.setdefault(parameter, chosen[name]) != chosen[name]:
                both = f"{shown(values[parameter])} and {shown(chosen[name])}"
                raise ConfigError(f"{step}: --{name} is one for the whole pipeline, got {both}")
        values[f"{step}_settings"] = encode(
            {key: chosen[key] for key in chosen if key not in STEP_SPECS[step].parameters}
        )
        values[f"{step}_fingerprint"] = found[step]
    given = {name: value for name, value in tracking.items() if value}
    return {**values, "tracking_settings": encode(given), "fingerprints": json.dumps(told)}
