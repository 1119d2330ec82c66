"""The pipeline that makes a general scorer: from many tasks to a registered version that others finetune."""

from collections.abc import Mapping, Sequence
from typing import Any

from kfp import dsl

from components.evaluation import evaluation
from components.pretraining import pretraining
from components.registration import registration
from components.tracking import tracking
from pipelines.dressing import Dress, plain
from pipelines.labelling import RUN, by_step, generators, labelled, seed_of, shared


def plan(
    *,
    source: str = "builtin",
    generator: Sequence[str] = ("builtin",),
    strategy: str = "",
    metric: str = "rougeL",
    name: str = "cappy-pretrained",
    seed: int = 0,
    split_seed: int | None = None,
    sampling_seed: int | None = None,
    training_seed: int | None = None,
    tracking_uri: str = "",
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """The settings of each step for a person's choices; `settings` adds more of them, step by step.

    `seed` stands where a seed of its own is None. Evaluation keeps its own: the bootstrap does not move with a run.
    """
    # The built-in pretraining pool keeps its test prompts for adaptation: it is judged on validation.
    builtin = source == "builtin"
    chosen: dict[str, dict[str, Any]] = {
        "preparation": {
            "source": source,
            "seed": seed_of(split_seed, seed),
            **({"pool": "pretraining"} if builtin else {}),
        },
        "sampling": {"generator": generators(generator), "strategy": strategy, "seed": seed_of(sampling_seed, seed)},
        "annotation": {"metric": metric},
        "pretraining": {"metric": metric, "seed": seed_of(training_seed, seed)},
        "evaluation": {"metric": metric, **({"split": "validation"} if builtin else {})},
        "registration": {"name": name, "tracking_uri": tracking_uri},
    }
    return {step: {**values, **(settings or {}).get(step, {})} for step, values in chosen.items()}


def build(shards: Sequence[str] = ("",), dress: Dress = plain) -> Any:
    """The pipeline with its samples drawn in these shards (i/N), and each task dressed for a platform."""

    @dsl.pipeline(name="cappy-pretrain", description="A general scorer: sample, annotate, pretrain, register.")  # type: ignore[untyped-decorator]
    def pretrain(
        source: str = "builtin",
        generator: list = ["builtin"],  # type: ignore[type-arg] # noqa: B006 (kfp reads the default, nobody changes it)
        strategy: str = "",
        metric: str = "rougeL",
        name: str = "cappy-pretrained",
        split_seed: int = 0,
        sampling_seed: int = 0,
        training_seed: int = 0,
        preparation_settings: str = "",
        sampling_settings: str = "",
        annotation_settings: str = "",
        gathering_settings: str = "",
        pretraining_settings: str = "",
        evaluation_settings: str = "",
        registration_settings: str = "",
        tracking_settings: str = "",
        preparation_fingerprint: str = "",
        sampling_fingerprint: str = "",
        annotation_fingerprint: str = "",
        gathering_fingerprint: str = "",
        pretraining_fingerprint: str = "",
        evaluation_fingerprint: str = "",
        registration_fingerprint: str = "",
        fingerprints: str = "{}",
    ) -> None:
        """Chains the steps; the exit step tells MLflow what each did, also after a failure."""
        settings, prints = by_step(locals())
        last = tracking(fingerprints=fingerprints, settings=tracking_settings, run=RUN)
        last.set_caching_options(False)
        dress("tracking", last)
        with dsl.ExitHandler(last, name="pretrain"):
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
            trained = pretraining(annotated=annotated, seed=training_seed, **shared("pretraining", settings, prints))
            dress("pretraining", trained)
            evaluated = evaluation(
                annotated=annotated,
                scorer=trained.outputs["pretrained"],
                metric=metric,
                **shared("evaluation", settings, prints),
            )
            dress("evaluation", evaluated)
            registered = registration(
                scorer=trained.outputs["pretrained"],
                report=evaluated.outputs["report"],
                name=name,
                **shared("registration", settings, prints),
            )
            registered.set_caching_options(False)
            dress("registration", registered)

    return pretrain


pretrain = build()
