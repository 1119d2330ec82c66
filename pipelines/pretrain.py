"""The pipeline that makes a general scorer: from many tasks to a registered version that others finetune."""

from collections.abc import Mapping, Sequence
from typing import Any

from kfp import dsl

from components.annotation import annotation
from components.evaluation import evaluation
from components.preparation import preparation
from components.pretraining import pretraining
from components.registration import registration
from components.sampling import sampling
from components.tracking import tracking

RUN = dsl.PIPELINE_JOB_ID_PLACEHOLDER


def plan(
    *,
    source: str = "builtin",
    generator: Sequence[str] = ("builtin",),
    strategy: str = "paper17",
    metric: str = "rougeL",
    name: str = "cappy-pretrained",
    seed: int = 0,
    tracking_uri: str = "",
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """The settings of each step for a person's choices; `settings` adds more of them, step by step."""
    # The built-in pretraining pool keeps its test prompts for adaptation: it is judged on validation.
    builtin = source == "builtin"
    chosen: dict[str, dict[str, Any]] = {
        "preparation": {"source": source, "seed": seed, **({"pool": "pretraining"} if builtin else {})},
        "sampling": {"generator": list(generator), "strategy": strategy, "seed": seed},
        "annotation": {"metric": metric},
        "pretraining": {"metric": metric, "seed": seed},
        "evaluation": {"metric": metric, "seed": seed, **({"split": "validation"} if builtin else {})},
        "registration": {"name": name, "tracking_uri": tracking_uri},
    }
    return {step: {**values, **(settings or {}).get(step, {})} for step, values in chosen.items()}


@dsl.pipeline(name="cappy-pretrain", description="A general scorer: sample, annotate, pretrain, evaluate, register.")  # type: ignore[untyped-decorator]
def pretrain(
    source: str = "builtin",
    generator: list = ["builtin"],  # type: ignore[type-arg] # noqa: B006 (kfp reads the default, nobody changes it)
    strategy: str = "paper17",
    metric: str = "rougeL",
    name: str = "cappy-pretrained",
    seed: int = 0,
    preparation_settings: str = "",
    sampling_settings: str = "",
    annotation_settings: str = "",
    pretraining_settings: str = "",
    evaluation_settings: str = "",
    registration_settings: str = "",
    tracking_settings: str = "",
    preparation_fingerprint: str = "",
    sampling_fingerprint: str = "",
    annotation_fingerprint: str = "",
    pretraining_fingerprint: str = "",
    evaluation_fingerprint: str = "",
    registration_fingerprint: str = "",
    fingerprints: str = "{}",
) -> None:
    """Chains the steps; the exit step tells MLflow what each did, also after a failure."""
    last = tracking(fingerprints=fingerprints, settings=tracking_settings, run=RUN)
    last.set_caching_options(False)
    with dsl.ExitHandler(last, name="pretrain"):
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
        trained = pretraining(
            annotated=labelled.outputs["annotated"],
            seed=seed,
            settings=pretraining_settings,
            fingerprint=pretraining_fingerprint,
            run=RUN,
        )
        evaluated = evaluation(
            annotated=labelled.outputs["annotated"],
            scorer=trained.outputs["pretrained"],
            metric=metric,
            seed=seed,
            settings=evaluation_settings,
            fingerprint=evaluation_fingerprint,
            run=RUN,
        )
        registered = registration(
            scorer=trained.outputs["pretrained"],
            report=evaluated.outputs["report"],
            name=name,
            settings=registration_settings,
            fingerprint=registration_fingerprint,
            run=RUN,
        )
        registered.set_caching_options(False)
