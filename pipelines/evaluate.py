"""The pipeline that measures a registered scorer on other data, such as the paper's held-out tasks."""

from collections.abc import Mapping, Sequence
from typing import Any

from kfp import dsl

from components.evaluation import evaluation
from components.tracking import tracking
from pipelines.dressing import Dress, plain
from pipelines.labelling import RUN, by_step, generators, labelled, seed_of, shared


def plan(
    *,
    source: str = "builtin",
    generator: Sequence[str] = ("builtin",),
    strategy: str = "",
    scorer: str = "models:/cappy@champion",
    metric: str = "rougeL",
    seed: int = 0,
    split_seed: int | None = None,
    sampling_seed: int | None = None,
    tracking_uri: str = "",
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """The settings of each step for a person's choices; `settings` adds more of them, step by step.

    `seed` stands where a seed of its own is None. Evaluation keeps its own: the bootstrap does not move with a run.
    """
    chosen: dict[str, dict[str, Any]] = {
        "preparation": {"source": source, "seed": seed_of(split_seed, seed)},
        "sampling": {"generator": generators(generator), "strategy": strategy, "seed": seed_of(sampling_seed, seed)},
        "annotation": {"metric": metric},
        "evaluation": {"scorer": scorer, "metric": metric},
    }
    return {step: {**values, **(settings or {}).get(step, {})} for step, values in chosen.items()}


def build(shards: Sequence[str] = ("",), dress: Dress = plain) -> Any:
    """The pipeline with its samples drawn in these shards (i/N), and each task dressed for a platform."""

    @dsl.pipeline(name="cappy-evaluate", description="A registered scorer, measured: sample, annotate, evaluate.")  # type: ignore[untyped-decorator]
    def evaluate(
        source: str = "builtin",
        generator: list = ["builtin"],  # type: ignore[type-arg] # noqa: B006 (kfp reads the default, nobody changes it)
        strategy: str = "",
        metric: str = "rougeL",
        split_seed: int = 0,
        sampling_seed: int = 0,
        preparation_settings: str = "",
        sampling_settings: str = "",
        annotation_settings: str = "",
        gathering_settings: str = "",
        evaluation_settings: str = "",
        tracking_settings: str = "",
        preparation_fingerprint: str = "",
        sampling_fingerprint: str = "",
        annotation_fingerprint: str = "",
        gathering_fingerprint: str = "",
        evaluation_fingerprint: str = "",
        fingerprints: str = "{}",
    ) -> None:
        """Chains the steps; the exit step tells MLflow what each did, also after a failure."""
        settings, prints = by_step(locals())
        last = tracking(fingerprints=fingerprints, settings=tracking_settings, run=RUN)
        last.set_caching_options(False)
        dress("tracking", last)
        with dsl.ExitHandler(last, name="evaluate"):
            annotated = labelled(
                shards,
                dress,
                source=source,
                generator=generator,
                strategy=strategy,
                metric=metric,
                split_seed=split_seed,
                sampling_seed=sampling_seed,
                settings=settings,
                fingerprints=prints,
            )
            evaluated = evaluation(annotated=annotated, metric=metric, **shared("evaluation", settings, prints))
            dress("evaluation", evaluated)

    return evaluate


evaluate = build()
