"""The front of both training pipelines: instances, samples and labels, in shards where there are several."""

from collections.abc import Mapping, Sequence
from typing import Any

from kfp import dsl

from cappy.errors import ConfigError, shown
from components.annotation import annotation
from components.gathering import gathering
from components.preparation import preparation
from components.sampling import sampling
from pipelines.dressing import Dress

RUN = dsl.PIPELINE_JOB_ID_PLACEHOLDER
AT_ONCE = 16
"""Shards that run at a time on a cluster; kfp's local runner takes two, whatever is asked for."""


def labelled(
    shards: Sequence[str],
    dress: Dress,
    *,
    source: Any,
    generator: Any,
    strategy: Any,
    metric: Any,
    split_seed: Any,
    sampling_seed: Any,
    settings: dict[str, Any],
    fingerprints: dict[str, Any],
) -> Any:
    """The annotated instances as an artifact; `settings` and `fingerprints` hold the parameters of these steps."""
    prepared = preparation(source=source, seed=split_seed, **shared("preparation", settings, fingerprints))
    dress("preparation", prepared)

    def one(**part: Any) -> Any:
        sampled = sampling(
            instances=prepared.outputs["instances"],
            generator=generator,
            strategy=strategy,
            seed=sampling_seed,
            **shared("sampling", settings, fingerprints),
            **part,
        )
        dress("sampling", sampled)
        annotated = annotation(
            candidates=sampled.outputs["candidates"],
            metric=metric,
            **shared("annotation", settings, fingerprints),
            **part,
        )
        dress("annotation", annotated)
        return annotated.outputs["annotated"]

    if len(shards) == 1:
        return one()
    with dsl.ParallelFor(list(shards), name="shards", parallelism=AT_ONCE) as shard:
        annotated = one(part=shard)
    gathered = gathering(parts=dsl.Collected(annotated), **shared("gathering", settings, fingerprints))
    dress("gathering", gathered)
    return gathered.outputs["gathered"]


def generators(given: Any) -> list[str]:
    """The generators that a person named: a list of specs, or one; ConfigError for anything else."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, Sequence) or not all(isinstance(one, str) for one in given):
        raise ConfigError(f"generator: is a list of LLMs, got {shown(given)}; give such as [builtin]")
    return list(given)


def seed_of(own: int | None, seed: int) -> int:
    """The seed of one kind of draw: its own where one is given, else the one for all."""
    return seed if own is None else own


def by_step(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings and the fingerprints among a pipeline's parameters, each by step."""
    settings, fingerprints = (
        {name.removesuffix(suffix): value for name, value in given.items() if name.endswith(suffix)}
        for suffix in ("_settings", "_fingerprint")
    )
    return settings, fingerprints


def shared(step: str, settings: dict[str, Any], fingerprints: dict[str, Any]) -> dict[str, Any]:
    """The parameters that every component has."""
    return {"settings": settings[step], "fingerprint": fingerprints[step], "run": RUN}
