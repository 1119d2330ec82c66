"""Sampling: adds candidates to every instance."""

from typing import Any

from kfp.dsl import Dataset, Input, Output

from components import component


@component()
def sampling(
    instances: Input[Dataset],
    candidates: Output[Dataset],
    generator: list,  # type: ignore[type-arg] # kfp has no list[str], only JSON lists
    strategy: str = "",
    seed: int = 0,
    settings: str = "",
    fingerprint: str = "",
    shard: str = "",
) -> None:
    """Sample responses to every instruction, or to those of shard i/N, from one or several LLMs."""
    from cappy.worker import launch

    values: dict[str, Any] = {"generator": generator, "strategy": strategy, "shard": shard, "seed": seed}
    folders = {"source": instances.path, "target": candidates.path}
    manifest = launch("sampling", settings, fingerprint=fingerprint, part=shard, **values, **folders)
    candidates.metadata.update(manifest=manifest.hash, rows=manifest.rows, candidates=manifest.candidates)
