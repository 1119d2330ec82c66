"""From a recipe to a submission: the settings of each step, where the work lies, what may be sent there."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from cappy.config import DEFAULT_WORK
from cappy.errors import ConfigError, quote
from cappy.steps import TRAINING_STEPS
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
from pipelines.submission import Submission, configs, external_names, prepare, refuse_artifacts

ON_THIS_MACHINE = ("local", "docker")


def settings_of(recipe: Recipe, platform: Platform = "local") -> Settings:
    """The settings of each step; ConfigError for a parameter that the pipeline has not.

    A training step that spreads over nodes gets the launcher of the platform; its own settings stand above that.
    """
    settings = plan_settings(recipe.pipeline, recipe.parameters, recipe.settings, tracking_uri=recipe.tracking_uri)
    extra = {step: values for step, values in recipe.settings.items() if step not in settings}
    jobs = _launchers(recipe, platform)
    return {step: _merge(jobs.get(step, {}), values) for step, values in {**settings, **extra}.items()}


def _merge(first: Mapping[str, object], second: Mapping[str, object]) -> dict[str, object]:
    """Both, the second above the first; groups of settings setting by setting."""
    both = {**first, **second}
    for name in first.keys() & second.keys():
        one, other = first[name], second[name]
        if isinstance(one, dict) and isinstance(other, dict):
            both[name] = {**one, **other}
    return both


def plan_settings(
    pipeline: str,
    parameters: Mapping[str, object],
    settings: Mapping[str, StepSettings],
    *,
    tracking_uri: str = "",
) -> Settings:
    """What the pipeline makes of parameters and settings; ConfigError for a parameter without an effect.

    Such a parameter says other than its default, and whatever it sets is set by something more special: `scorer`
    beside `finetuning.scorer`, or `seed` beside a seed for each kind of draw.
    """
    plan = PIPELINES[pipeline].settings
    whole = plan(parameters, settings, tracking_uri)

    def attempt(chosen: Mapping[str, object], more: Mapping[str, StepSettings]) -> Settings | None:
        try:
            return plan(chosen, more, tracking_uri)
        except ConfigError:  # Without a parameter that is needed.
            return None

    for name, value in parameters.items():
        needed = {other: parameters[other] for other in ("source",) if other in parameters and other != name}
        alone = attempt({**needed, name: value}, {}) != attempt(needed, {})
        others = {other: given for other, given in parameters.items() if other != name}
        if alone and attempt(others, settings) == whole:
            remedy = "settings or other parameters give all that it would; leave it out"
            raise ConfigError(f"parameters: {name}: {quote(value)} has no effect; {remedy}")
    return whole


def work_of(recipe: Recipe, platform: Platform) -> Path:
    """The work folder: a local one, a place on the volume, or one in the bucket as Vertex AI mounts it."""
    if platform in ON_THIS_MACHINE:
        return Path(recipe.work or DEFAULT_WORK)
    root = root_of(recipe, platform)
    work = Path(recipe.work or f"{root}/cappy")
    if ".." in work.parts or not work.is_relative_to(root):
        raise ConfigError(f"work: {work} is not under {root}, which every step on {platform} sees; leave it out")
    return work


def registry_of(recipe: Recipe, platform: Platform) -> str:
    """MLflow's address as this machine reaches it: what MLFLOW_TRACKING_URI says, where the steps run elsewhere."""
    elsewhere = "" if platform in ON_THIS_MACHINE else os.environ.get("MLFLOW_TRACKING_URI", "")
    return elsewhere or recipe.tracking_uri


def root_of(recipe: Recipe, platform: Platform) -> str:
    """The folder that every step sees: the volume, or the bucket as Vertex AI mounts it."""
    if platform != "vertex":
        return recipe.kubeflow.mount
    return f"/gcs/{recipe.vertex.bucket.removeprefix('gs://')}".rstrip("/")


def check_settings(recipe: Recipe, platform: Platform = "local") -> Settings:
    """The settings of each step, once every config takes them; ConfigError for one that is wrong or not a person's."""
    settings = settings_of(recipe, platform)
    refuse_artifacts(recipe.pipeline, recipe.settings)
    work = {"work": str(work_of(recipe, platform))}
    configs({step: {**settings.get(step, {}), **work} for step in recipe.steps})
    return settings


def check(recipe: Recipe, platform: Platform = "local") -> None:
    """ConfigError for what could not work on the platform, as far as the recipe alone shows it; asks no registry."""
    settings = check_settings(recipe, platform)
    if platform not in ON_THIS_MACHINE:
        _refuse_local_files(recipe, settings, root_of(recipe, platform))
        _refuse_local_registry(recipe, settings)
        refuse_missing_address(recipe.kubeflow if platform == "kubeflow" else recipe.vertex)
    else:
        _refuse_missing_files(settings)


def submission_of(recipe: Recipe, platform: Platform = "local") -> Submission:
    """What is handed to the platform; ConfigError for what could not work there, or names a version that is missing."""
    check(recipe, platform)
    return prepare(
        recipe.pipeline,
        settings_of(recipe, platform),
        work=work_of(recipe, platform),
        shards=recipe.shards,
        tracking_uri=recipe.tracking_uri,
        revision=recipe.revision,
        registry=registry_of(recipe, platform),
        images={step: image(recipe, step) for step in recipe.steps},
    )


def _refuse_missing_files(settings: Mapping[str, StepSettings]) -> None:
    """ConfigError for a file or folder of this machine that is not there."""
    for step, name, text in _all_external_names(settings):
        if text != "builtin" and ":" not in text and not Path(text).exists():
            raise ConfigError(f"{step}: --{name}: {text}: no such file or folder; check the path")


def _all_external_names(settings: Mapping[str, StepSettings]) -> Iterator[tuple[str, str, str]]:
    """Step, setting and text of all that the settings name outside."""
    for step, values in settings.items():
        for name, text in external_names(step, values):
            yield step, name, text


def _refuse_local_files(recipe: Recipe, settings: Mapping[str, StepSettings], root: str) -> None:
    """ConfigError for a file of this machine, which no step would find, and for unseen content without a revision."""
    for step, name, text in _all_external_names(settings):
        _refuse_local_file(recipe, f"{step}: --{name}", text, root)


def _refuse_local_file(recipe: Recipe, where: str, text: str, root: str) -> None:
    if text == "builtin" or ":" in text:
        return
    if not Path(text).is_relative_to(root):
        remedy = f"copy it there and give {root}/..."
        raise ConfigError(f"{where}: {text} does not lie under {root}, which is all that every step sees; {remedy}")
    if not Path(text).exists() and not recipe.revision:
        remedy = "give revision: in the recipe, any text that changes when it does"
        raise ConfigError(
            f"{where}: {text} cannot be seen from here, so a changed one would be answered from the cache; {remedy}"
        )


def _refuse_local_registry(recipe: Recipe, settings: Mapping[str, StepSettings]) -> None:
    """ConfigError for an address of MLflow, of the run or of one step, that no step of a cluster reaches."""
    own = {f"settings.{step}.tracking_uri": values.get("tracking_uri") for step, values in settings.items()}
    for where, address in {"tracking_uri": recipe.tracking_uri, **{k: v for k, v in own.items() if v}}.items():
        refuse_password(where, str(address))
        if not str(address).startswith(("http://", "https://")):
            remedy = "give tracking_uri: http(s)://HOST of an MLflow server in the recipe"
            raise ConfigError(f"{where}: {quote(address)} is not reachable from a cluster; {remedy}")


def _launchers(recipe: Recipe, platform: Platform) -> Settings:
    """Step -> settings of those training steps that spread over nodes; none where a step trains in its own pod.

    `retries` of the recipe are the job's and those of the step that follows it; so are `hours`, but for a little.
    """
    spread = [step for step in recipe.steps if step in TRAINING_STEPS and recipe.needs(step).nodes > 1]
    if platform == "kubeflow":
        return {step: _trainjob(recipe, step) for step in spread}
    if platform == "vertex":
        return {step: _customjob(recipe, step) for step in spread}
    return {}


def _job_settings(recipe: Recipe, step: str) -> dict[str, object]:
    needs = recipe.needs(step)
    return {
        "nodes": needs.nodes,
        "devices": needs.count if needs.accelerator != "none" else 1,
        "image": image(recipe, step),
        "max_restarts": needs.retries,
        # The job ends by itself before the step that follows it does, which then says why.
        "timeout_hours": 0.95 * needs.hours,
    }


def _trainjob(recipe: Recipe, step: str) -> dict[str, object]:
    needs, place = recipe.needs(step), recipe.kubeflow
    accelerator = "" if needs.accelerator == "none" else kubernetes_resource(needs.accelerator)
    return {
        "launcher": "trainjob",
        **_job_settings(recipe, step),
        "trainjob": {
            "cpu": needs.cpu,
            "memory": needs.memory,
            "volume": f"{place.volume}:{place.mount}",
            "accelerator": accelerator,
            "namespace": place.namespace,
            "runtime": place.runtime,
        },
    }


def _customjob(recipe: Recipe, step: str) -> dict[str, object]:
    needs, place = recipe.needs(step), recipe.vertex
    return {
        "launcher": "customjob",
        **_job_settings(recipe, step),
        "service_account": place.service_account,
        "customjob": {
            "accelerator": VERTEX_TYPES.get(needs.accelerator, ""),
            "project": place.project,
            "region": place.region,
            "bucket": place.bucket,
            "network": place.network,
            "machine": needs.machine_type,
            "spot": needs.spot,
        },
    }
