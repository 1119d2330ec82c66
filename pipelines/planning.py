"""Turns a recipe into a submission: the settings of each step, the work folder, and checks for the platform."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from cappy.config import DEFAULT_WORK
from cappy.errors import CappyError, ConfigError, Problems, quote
from cappy.specs import missing_generator
from cappy.steps import STEP_SPECS, TRAINING_STEPS
from cappy.worker import StepConfig
from pipelines.customize import image
from pipelines.definitions import PIPELINES, Settings, StepSettings
from pipelines.recipe import (
    VERTEX_TYPES,
    Platform,
    Recipe,
    kubernetes_resource,
    refuse_missing_address,
    refuse_password,
)
from pipelines.submission import Submission, configs, external_references, prepare, refuse_artifacts

LOCAL_PLATFORMS = ("local", "docker")
ADDRESS = re.compile(r"(gs|s3|s3a|az|abfss?|https?|hdfs)://")
"""Beginning of an address in a store that steps do not mount."""


def settings_of(recipe: Recipe, platform: Platform = "local") -> Settings:
    """The settings of each step; raises ConfigError for an unknown parameter.

    A training step with several nodes gets the platform's launcher, which the step's own settings override.
    """
    settings = plan_settings(recipe.pipeline, recipe.parameters, recipe.settings, tracking_uri=recipe.tracking_uri)
    extra = {step: values for step, values in recipe.settings.items() if step not in settings}
    launchers = _launchers(recipe, platform)
    merged = {step: _merge(launchers.get(step, {}), values) for step, values in {**settings, **extra}.items()}
    return {step: _mounted(step, values) for step, values in merged.items()} if platform == "vertex" else merged


def _mounted(step: str, values: Mapping[str, object]) -> dict[str, object]:
    """The settings with gs://BUCKET/PATH replaced by /gcs/BUCKET/PATH, where Vertex AI mounts it in every step."""

    def path(value: object) -> object:
        if isinstance(value, list | tuple):
            return [path(each) for each in value]
        return f"/gcs/{value.removeprefix('gs://')}" if isinstance(value, str) and value.startswith("gs://") else value

    external = STEP_SPECS[step].external_settings if step in STEP_SPECS else ()
    return {name: path(value) if name in external else value for name, value in values.items()}


def _merge(base: Mapping[str, object], overrides: Mapping[str, object]) -> dict[str, object]:
    """Returns `base` updated with `overrides`; groups of settings (dicts) are merged too."""
    merged = {**base, **overrides}
    for name in base.keys() & overrides.keys():
        old_group, new_group = base[name], overrides[name]
        if isinstance(old_group, dict) and isinstance(new_group, dict):
            merged[name] = {**old_group, **new_group}
    return merged


def plan_settings(
    pipeline: str,
    parameters: Mapping[str, object],
    settings: Mapping[str, StepSettings],
    *,
    tracking_uri: str = "",
) -> Settings:
    """The settings of each step of the pipeline; raises ConfigError for a parameter without effect.

    A parameter has no effect if it differs from its default but everything that it sets is overridden: `scorer` by
    `finetuning.scorer`, or `seed` by `split_seed`, `sampling_seed` and `training_seed`.
    """
    plan = PIPELINES[pipeline].settings
    complete = plan(parameters, settings, tracking_uri)

    def attempt(parameter_values: Mapping[str, object], overrides: Mapping[str, StepSettings]) -> Settings | None:
        try:
            return plan(parameter_values, overrides, tracking_uri)
        except ConfigError:  # A required parameter is missing.
            return None

    for name, value in parameters.items():
        required = {key: parameters[key] for key in ("source",) if key in parameters and key != name}
        changes_defaults = attempt({**required, name: value}, {}) != attempt(required, {})
        others = {key: value for key, value in parameters.items() if key != name}
        if changes_defaults and attempt(others, settings) == complete:
            remedy = "settings or other parameters override it; leave it out"
            raise ConfigError(f"parameters: {name}: {quote(value)} has no effect; {remedy}")
    return complete


def work_of(recipe: Recipe, platform: Platform) -> Path:
    """The work folder: local, on the volume, or in the mounted bucket; raises ConfigError if steps cannot share it."""
    if platform in LOCAL_PLATFORMS:
        return Path(recipe.work or DEFAULT_WORK)
    root = root_of(recipe, platform)
    work = Path(recipe.work or f"{root}/cappy")
    if ".." in work.parts or not work.is_relative_to(root):
        raise ConfigError(f"work: {work} is not under {root}, the folder that steps on {platform} share; leave it out")
    return work


def registry_of(recipe: Recipe, platform: Platform) -> str:
    """MLflow's address for this machine: the recipe's, or MLFLOW_TRACKING_URI if it is set and steps run elsewhere."""
    address_from_here = "" if platform in LOCAL_PLATFORMS else os.environ.get("MLFLOW_TRACKING_URI", "")
    return address_from_here or recipe.tracking_uri


def root_of(recipe: Recipe, platform: Platform) -> str:
    """The folder that all steps share: the volume, or the bucket as Vertex AI mounts it."""
    if platform != "vertex":
        return recipe.kubeflow.mount
    return f"/gcs/{recipe.vertex.bucket.removeprefix('gs://')}".rstrip("/")


def check_settings(recipe: Recipe, platform: Platform = "local") -> Settings:
    """The settings of each step; raises ConfigError for an invalid one, or one that the pipeline sets itself."""
    settings = settings_of(recipe, platform)
    refuse_artifacts(recipe.pipeline, recipe.settings)
    configs_of(recipe, platform)
    return settings


def configs_of(recipe: Recipe, platform: Platform = "local") -> dict[str, StepConfig]:
    """The config of each step; raises ConfigError if a setting is invalid."""
    settings = settings_of(recipe, platform)
    work = {"work": str(work_of(recipe, platform))}
    return configs({step: {**settings.get(step, {}), **work} for step in recipe.steps})


def check(recipe: Recipe, platform: Platform = "local") -> None:
    """Raises ConfigError if the recipe shows that it cannot work on the platform; does not contact the registry."""
    settings = check_settings(recipe, platform)
    if platform not in LOCAL_PLATFORMS:
        problems = Problems()
        for step, name, text in _all_external_references(settings):
            with problems.collect():
                _refuse_local_file(recipe, f"{step}: --{name}", text, root_of(recipe, platform))
        with problems.collect():
            _refuse_local_registry(recipe, settings)
        with problems.collect():
            refuse_missing_address(recipe.kubeflow if platform == "kubeflow" else recipe.vertex)
        problems.raise_all()
    else:
        check_references(settings)


def submission_of(recipe: Recipe, platform: Platform = "local") -> Submission:
    """The submission for the platform; raises ConfigError if it cannot work there or a model version is missing."""
    check(recipe, platform)
    return prepare(
        recipe.pipeline,
        settings_of(recipe, platform),
        work=work_of(recipe, platform),
        shards=recipe.shards,
        tracking_uri=recipe.tracking_uri,
        revision=recipe.revision,
        registry=registry_of(recipe, platform),
        images={step: _image_content(image(recipe, step)) for step in recipe.steps},
    )


def _image_content(name: str) -> str:
    """What identifies an image's content: its digest if the name has one, in whatever registry, else the name."""
    return name.partition("@")[2] or name


def check_references(settings: Mapping[str, StepSettings]) -> None:
    """Raises ConfigError for a missing file or folder on this machine; ProblemsError for several."""
    problems = Problems()
    for step, name, text in _all_external_references(settings):
        if ADDRESS.match(text):
            problem = f"{text} is not a file of this machine; download it and give its path"
            problems.errors.append(ConfigError(f"{step}: --{name}: {problem}"))
        elif text != "builtin" and ":" not in text and not Path(text).exists():
            missing: CappyError = ConfigError(f"{text}: no such file or folder; check the path")
            if name == "generator":
                missing = missing_generator(text)
            problems.errors.append(ConfigError(f"{step}: --{name}: {missing}"))
    problems.raise_all()


def _all_external_references(settings: Mapping[str, StepSettings]) -> Iterator[tuple[str, str, str]]:
    """Yields (step, setting, text) of every external path or spec in the settings."""
    for step, values in settings.items():
        for name, text in external_references(step, values):
            # The adapt pipeline reports the scorer that finetuning starts from: one mistake, one error.
            if (step, name) != ("evaluation", "initial") or text != settings.get("finetuning", {}).get("scorer"):
                yield step, name, text


def _refuse_local_file(recipe: Recipe, where: str, text: str, root: str) -> None:
    """Raises ConfigError for a file outside the shared folder, or not visible from here while `revision` is empty."""
    if ADDRESS.match(text):
        raise ConfigError(f"{where}: {text} is not a file of a shared folder; copy it there and give {root}/...")
    if text == "builtin" or ":" in text:
        return
    # Vertex AI mounts every bucket.
    shared = "/gcs" if root.startswith("/gcs/") else root
    if not Path(text).is_relative_to(shared):
        remedy = f"copy it there and give {root}/..."
        raise ConfigError(f"{where}: {text} is not under {root}, the only folder that all steps share; {remedy}")
    if not Path(text).exists() and not recipe.revision:
        remedy = "set revision: in the recipe, to any text that changes when the file does"
        raise ConfigError(
            f"{where}: {text} is not visible from here, so the cache would be used even if it changes; {remedy}"
        )


def _refuse_local_registry(recipe: Recipe, settings: Mapping[str, StepSettings]) -> None:
    """Raises ConfigError if the run or a step has an MLflow address that cannot be reached from a cluster."""
    addresses = {f"settings.{step}.tracking_uri": values.get("tracking_uri") for step, values in settings.items()}
    for where, address in {
        "tracking_uri": recipe.tracking_uri,
        **{key: address for key, address in addresses.items() if address},
    }.items():
        refuse_password(where, str(address))
        if not str(address).startswith(("http://", "https://")):
            remedy = "give tracking_uri: http(s)://HOST of an MLflow server in the recipe"
            raise ConfigError(f"{where}: {quote(address)} is not reachable from a cluster; {remedy}")


def _launchers(recipe: Recipe, platform: Platform) -> Settings:
    """Step -> settings of where it trains: several nodes in a job of the platform, others in their own pod.

    Each trains on all of its accelerators; raises ConfigError if the step's settings say otherwise. The recipe's
    `retries` apply to both the job and the step that monitors it, as do `hours`, of which the job gets 95%.
    """
    if platform in LOCAL_PLATFORMS:
        return {}
    launchers: Settings = {}
    for step in (step for step in recipe.steps if step in TRAINING_STEPS):
        resources, devices = recipe.resources_of(step), recipe.settings.get(step, {}).get("devices")
        if devices not in (None, resources.count) and resources.accelerator != "none":
            problem = f"{resources.count} {resources.accelerator}, but settings.{step}.devices is {devices}"
            raise ConfigError(f"resources.{step}.count: {problem}; leave devices out")
        if resources.nodes > 1:
            launchers[step] = _trainjob(recipe, step) if platform == "kubeflow" else _customjob(recipe, step)
        elif resources.count > 1:
            launchers[step] = {"devices": resources.count}
    return launchers


def _job_settings(recipe: Recipe, step: str) -> dict[str, object]:
    resources = recipe.resources_of(step)
    return {
        "nodes": resources.nodes,
        "devices": resources.count if resources.accelerator != "none" else 1,
        "image": image(recipe, step),
        "max_restarts": resources.retries,
        # The job must time out before the step that monitors it does, so that the step can report why.
        "timeout_hours": 0.95 * resources.hours,
    }


def _trainjob(recipe: Recipe, step: str) -> dict[str, object]:
    resources, kubeflow = recipe.resources_of(step), recipe.kubeflow
    accelerator = "" if resources.accelerator == "none" else kubernetes_resource(resources.accelerator)
    return {
        "launcher": "trainjob",
        **_job_settings(recipe, step),
        "trainjob": {
            "cpu": resources.cpu,
            "memory": resources.memory,
            "volume": f"{kubeflow.volume}:{kubeflow.mount}",
            "accelerator": accelerator,
            "namespace": kubeflow.namespace,
            "runtime": kubeflow.runtime,
        },
    }


def _customjob(recipe: Recipe, step: str) -> dict[str, object]:
    resources, vertex = recipe.resources_of(step), recipe.vertex
    return {
        "launcher": "customjob",
        **_job_settings(recipe, step),
        "service_account": vertex.service_account,
        "customjob": {
            "accelerator": VERTEX_TYPES.get(resources.accelerator, ""),
            "project": vertex.project,
            "region": vertex.region,
            "bucket": vertex.bucket,
            "network": vertex.network,
            "machine": resources.machine_type,
            "spot": resources.spot,
        },
    }
