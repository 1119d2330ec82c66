"""Sampling: candidates for every instance."""

from kfp.dsl import Dataset, Input, Output

from components.component import component


@component()
def sampling(
    instances: Input[Dataset],
    candidates: Output[Dataset],
    generator: list,  # type: ignore[type-arg] # kfp knows no list[str]: it is a JSON list
    strategy: str = "",
    seed: int = 0,
    settings: str = "",
    fingerprint: str = "",
    part: str = "",
    run: str = "",
) -> None:
    """Let one LLM or several propose responses to every instruction, or to those of a part of them, i/N."""
    from cappy.worker import launch

    changed = {"generator": generator, "strategy": strategy, "shard": part, "seed": seed}
    folders = {"source": instances.path, "target": candidates.path}
    done = launch("sampling", settings, fingerprint=fingerprint, part=part, run=run, **changed, **folders)
    candidates.metadata.update(manifest=done.hash, rows=done.rows, candidates=done.candidates)
