"""The pipeline that most people want: a scorer for one task, from its instances to a version that can be served."""

from collections.abc import Mapping, Sequence
from typing import Any

from kfp import dsl

from components.annotation import annotation
from components.deployment import deployment
from components.evaluation import evaluation
from components.finetuning import finetuning
from components.preparation import preparation
from components.promotion import promotion
from components.registration import registration
from components.sampling import sampling
from components.tracking import tracking

RUN = dsl.PIPELINE_JOB_ID_PLACEHOLDER


def plan(
    *,
    source: str = "builtin",
    generator: Sequence[str] = ("builtin",),
    strategy: str = "paper17",
    scorer: str = "builtin",
    metric: str = "rougeL",
    name: str = "cappy",
    seed: int = 0,
    margin: float = 0.0,
    tracking_uri: str = "",
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """The settings of each step for a person's choices; `settings` adds more of them, step by step."""
    registry = {"tracking_uri": tracking_uri}
    chosen: dict[str, dict[str, Any]] = {
        "preparation": {"source": source, "seed": seed},
        "sampling": {"generator": list(generator), "strategy": strategy, "seed": seed},
        "annotation": {"metric": metric},
        "finetuning": {"scorer": scorer, "metric": metric, "seed": seed},
        "evaluation": {"metric": metric, "seed": seed},
        "registration": {"name": name, **registry},
        "promotion": {"margin": margin, **registry},
        "deployment": registry,
    }
    return {step: {**values, **(settings or {}).get(step, {})} for step, values in chosen.items()}


@dsl.pipeline(name="cappy-adapt", description="A scorer for one task: sample, annotate, finetune, evaluate, promote.")  # type: ignore[untyped-decorator]
def adapt(
    source: str = "builtin",
    generator: list = ["builtin"],  # type: ignore[type-arg] # noqa: B006 (kfp reads the default, nobody changes it)
    strategy: str = "paper17",
    scorer: str = "builtin",
    champion: str = "",
    metric: str = "rougeL",
    name: str = "cappy",
    margin: float = 0.0,
    seed: int = 0,
    preparation_settings: str = "",
    sampling_settings: str = "",
    annotation_settings: str = "",
    finetuning_settings: str = "",
    evaluation_settings: str = "",
    registration_settings: str = "",
    promotion_settings: str = "",
    deployment_settings: str = "",
    tracking_settings: str = "",
    preparation_fingerprint: str = "",
    sampling_fingerprint: str = "",
    annotation_fingerprint: str = "",
    finetuning_fingerprint: str = "",
    evaluation_fingerprint: str = "",
    registration_fingerprint: str = "",
    promotion_fingerprint: str = "",
    deployment_fingerprint: str = "",
    fingerprints: str = "{}",
) -> None:
    """Chains the steps; the exit step tells MLflow what each did, also after a failure."""
    last = tracking(fingerprints=fingerprints, settings=tracking_settings, run=RUN)
    last.set_caching_options(False)
    with dsl.ExitHandler(last, name="adapt"):
        prepared = preparation(
            source=source, seed=seed, settings=preparation_settings, fingerprint=preparation_fingerprint, run=RUN
        )
        sampled = sampling(
            instances=prepared.outputs["instances"],
            generator=generator,
            strategy=strategy,
            seed=seed,
            settings=sampling_settings,
            fingerprint=sampling_fingerprint,
            run=RUN,
        )
        labelled = annotation(
            candidates=sampled.outputs["candidates"],
            metric=metric,
            settings=annotation_settings,
            fingerprint=annotation_fingerprint,
            run=RUN,
        )
        trained = finetuning(
            annotated=labelled.outputs["annotated"],
            scorer=scorer,
            seed=seed,
            settings=finetuning_settings,
            fingerprint=finetuning_fingerprint,
            run=RUN,
        )
        evaluated = evaluation(
            annotated=labelled.outputs["annotated"],
            scorer=trained.outputs["finetuned"],
            champion=champion,
            metric=metric,
            seed=seed,
            settings=evaluation_settings,
            fingerprint=evaluation_fingerprint,
            run=RUN,
        )
        registered = registration(
            scorer=trained.outputs["finetuned"],
            report=evaluated.outputs["report"],
            name=name,
            settings=registration_settings,
            fingerprint=registration_fingerprint,
            run=RUN,
        )
        registered.set_caching_options(False)
        decided = promotion(
            version=registered.outputs["version"],
            report=evaluated.outputs["report"],
            margin=margin,
            settings=promotion_settings,
            fingerprint=promotion_fingerprint,
            run=RUN,
        )
        decided.set_caching_options(False)
        with dsl.If(decided.outputs["Output"] == "promote", name="promoted"):
            deployed = deployment(
                version=registered.outputs["version"],
                report=evaluated.outputs["report"],
                settings=deployment_settings,
                fingerprint=deployment_fingerprint,
                run=RUN,
            )
            deployed.set_caching_options(False)
