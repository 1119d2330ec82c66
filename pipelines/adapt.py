"""The pipeline that most people want: a scorer for one task, from its instances to a version that can be served."""

from collections.abc import Mapping, Sequence
from typing import Any

from kfp import dsl

from components.deployment import deployment
from components.evaluation import evaluation
from components.finetuning import finetuning
from components.promotion import promotion
from components.registration import registration
from components.tracking import tracking
from pipelines.dressing import Dress, plain
from pipelines.labelling import RUN, by_step, generators, labelled, seed_of, shared


def plan(
    *,
    source: str = "builtin",
    generator: Sequence[str] = ("builtin",),
    strategy: str = "",
    scorer: str = "builtin",
    metric: str = "rougeL",
    name: str = "cappy",
    seed: int = 0,
    split_seed: int | None = None,
    sampling_seed: int | None = None,
    training_seed: int | None = None,
    margin: float = 0.0,
    tracking_uri: str = "",
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """The settings of each step for a person's choices; `settings` adds more of them, step by step.

    `seed` stands where a seed of its own is None. Evaluation keeps its own: the bootstrap does not move with a run.
    """
    registry = {"tracking_uri": tracking_uri}
    chosen: dict[str, dict[str, Any]] = {
        "preparation": {"source": source, "seed": seed_of(split_seed, seed)},
        "sampling": {"generator": generators(generator), "strategy": strategy, "seed": seed_of(sampling_seed, seed)},
        "annotation": {"metric": metric},
        "finetuning": {"scorer": scorer, "metric": metric, "seed": seed_of(training_seed, seed)},
        "evaluation": {"metric": metric},
        "registration": {"name": name, **registry},
        "promotion": {"margin": margin, **registry},
        "deployment": registry,
    }
    return {step: {**values, **(settings or {}).get(step, {})} for step, values in chosen.items()}


def build(shards: Sequence[str] = ("",), dress: Dress = plain) -> Any:
    """The pipeline with its samples drawn in these shards (i/N), and each task dressed for a platform."""

    @dsl.pipeline(name="cappy-adapt", description="A scorer for one task: sample, annotate, finetune, promote.")  # type: ignore[untyped-decorator]
    def adapt(
        source: str = "builtin",
        generator: list = ["builtin"],  # type: ignore[type-arg] # noqa: B006 (kfp reads the default, nobody changes it)
        strategy: str = "",
        scorer: str = "builtin",
        champion: str = "",
        metric: str = "rougeL",
        name: str = "cappy",
        margin: float = 0.0,
        split_seed: int = 0,
        sampling_seed: int = 0,
        training_seed: int = 0,
        preparation_settings: str = "",
        sampling_settings: str = "",
        annotation_settings: str = "",
        gathering_settings: str = "",
        finetuning_settings: str = "",
        evaluation_settings: str = "",
        registration_settings: str = "",
        promotion_settings: str = "",
        deployment_settings: str = "",
        tracking_settings: str = "",
        preparation_fingerprint: str = "",
        sampling_fingerprint: str = "",
        annotation_fingerprint: str = "",
        gathering_fingerprint: str = "",
        finetuning_fingerprint: str = "",
        evaluation_fingerprint: str = "",
        registration_fingerprint: str = "",
        promotion_fingerprint: str = "",
        deployment_fingerprint: str = "",
        fingerprints: str = "{}",
    ) -> None:
        """Chains the steps; the exit step tells MLflow what each did, also after a failure."""
        settings, prints = by_step(locals())
        last = tracking(fingerprints=fingerprints, settings=tracking_settings, run=RUN)
        last.set_caching_options(False)
        dress("tracking", last)
        with dsl.ExitHandler(last, name="adapt"):
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
            trained = finetuning(
                annotated=annotated, scorer=scorer, seed=training_seed, **shared("finetuning", settings, prints)
            )
            dress("finetuning", trained)
            evaluated = evaluation(
                annotated=annotated,
                scorer=trained.outputs["finetuned"],
                champion=champion,
                metric=metric,
                **shared("evaluation", settings, prints),
            )
            dress("evaluation", evaluated)
            registered = registration(
                scorer=trained.outputs["finetuned"],
                report=evaluated.outputs["report"],
                name=name,
                **shared("registration", settings, prints),
            )
            registered.set_caching_options(False)
            dress("registration", registered)
            decided = promotion(
                version=registered.outputs["version"],
                report=evaluated.outputs["report"],
                margin=margin,
                **shared("promotion", settings, prints),
            )
            decided.set_caching_options(False)
            dress("promotion", decided)
            with dsl.If(decided.outputs["Output"] == "promote", name="promoted"):
                deployed = deployment(
                    version=registered.outputs["version"],
                    report=evaluated.outputs["report"],
                    **shared("deployment", settings, prints),
                )
                deployed.set_caching_options(False)
                dress("deployment", deployed)

    return adapt


adapt = build()
