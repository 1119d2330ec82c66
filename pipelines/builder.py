"""Builds the kfp pipeline of a recipe and compiles it to YAML for Kubeflow and Vertex AI."""

import importlib
import inspect
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import yaml
from kfp import dsl
from kfp.compiler import Compiler

from cappy.errors import ConfigError, quote
from cappy.steps import STEP_SPECS
from cappy.untrusted import load_all_yaml
from components import Component, Task
from pipelines.customize import TaskCustomizer, customizer_for
from pipelines.definitions import PIPELINES, TRACKING_TASK, Artifacts, Definition, shards_of
from pipelines.recipe import Platform, Recipe

RUN_ID_PLACEHOLDER = dsl.PIPELINE_JOB_ID_PLACEHOLDER
"""kfp's placeholder for the id of the run; for Vertex AI, `compile_pipeline` puts that for the job's name instead."""
_MAX_CHARACTERS = 2**23
_OLD_IMPORT = "from cappy.steps import launch"
"""This line is in every component that was compiled before `launch` moved to `cappy.worker`."""
PARALLEL_SHARDS = 16
"""How many shards run at once on a cluster; kfp's local runner always runs two."""


class Pipeline(Protocol):
    """A kfp pipeline: `Compiler` compiles it, and a call runs it on kfp's local runner."""

    pipeline_spec: Any

    def __call__(self, **arguments: object) -> object: ...


def build(recipe: Recipe, platform: Platform = "local") -> Pipeline:
    """Builds the kfp pipeline of a recipe, with tasks customized for the platform.

    Raises ConfigError for a resource that the platform does not support.
    """
    definition, shards = PIPELINES[recipe.pipeline], shards_of(recipe.shards)
    # Steps do not know their run on Vertex AI: those that started after its creation belong to it.
    created = dsl.PIPELINE_JOB_CREATE_TIME_UTC_PLACEHOLDER if platform == "vertex" else ""
    return build_pipeline(definition, shards, customizer_for(platform, recipe), created)


def build_pipeline(
    definition: Definition, shards: Sequence[str], customize: TaskCustomizer, created: str = ""
) -> Pipeline:
    """Builds the kfp pipeline of a definition.

    It has the components' parameters, with their types, under their pipeline names (`StepSpec.parameters`), and two
    more per step: `STEP_settings` (encoded) and `STEP_fingerprint`. Defaults come from the definition, otherwise from
    the components. `source` is required if the definition has no default for it. `created` is the placeholder of the
    run's creation time, for platforms where steps do not know their run.
    """
    signature = _signature(definition, len(shards))

    def pipeline(*values: object) -> None:
        arguments = dict(zip(signature.parameters, values, strict=True))
        exit_task = _add_task(
            TRACKING_TASK,
            fingerprints=arguments["fingerprints"],
            settings=arguments["tracking_settings"],
            run=RUN_ID_PLACEHOLDER,
            created=created,
        )
        exit_task.set_caching_options(False)
        customize(TRACKING_TASK, exit_task)
        # kfp derives names of inner tasks from this one, and stored runs depend on it.
        with dsl.ExitHandler(exit_task, name=definition.name.replace("_", "-")):
            definition.chain(_TaskGraph(arguments, shards, customize))

    pipeline.__name__ = definition.name
    pipeline.__signature__ = signature  # type: ignore[attr-defined]
    decorate: Callable[[Callable[..., None]], Pipeline] = dsl.pipeline(
        name=definition.kfp_name, description=definition.description
    )
    return decorate(pipeline)


def compile_pipeline(recipe: Recipe, platform: Platform = "local") -> str:
    """Compiles a recipe to YAML; needs only kfp. For Kubeflow a second YAML document has the pods' settings."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        Compiler().compile(build(recipe, platform), str(path))
        text = path.read_text(encoding="utf-8")
    if platform == "vertex":
        # The submitter chooses the job's name, which names the MLflow run; only a task knows the job's id.
        text = text.replace(RUN_ID_PLACEHOLDER, dsl.PIPELINE_JOB_NAME_PLACEHOLDER)
    return text


class _TaskGraph:
    """A `Graph` that adds kfp tasks; `arguments` are the pipeline's parameters by name."""

    def __init__(self, arguments: Mapping[str, object], shards: Sequence[str], customize: TaskCustomizer) -> None:
        self._arguments, self._shards, self._customize = arguments, shards, customize
        self._shard_argument: dict[str, object] = {}

    def add_step(self, step: str, **inputs: object) -> Artifacts:
        spec = STEP_SPECS[step]
        parameters = {
            setting: self._arguments[parameter]
            for setting, parameter in spec.parameters.items()
            if setting not in inputs and parameter in self._arguments
        }
        task = _add_task(
            step,
            **inputs,
            **parameters,
            **(self._shard_argument if spec.sharded else {}),
            settings=self._arguments[f"{step}_settings"],
            fingerprint=self._arguments[f"{step}_fingerprint"],
            **({} if spec.cached else {"run": RUN_ID_PLACEHOLDER}),
        )
        if not spec.cached:
            task.set_caching_options(False)
        self._customize(step, task)
        return task.outputs

    def for_each_shard(self, chain: Callable[[], object]) -> object:
        if len(self._shards) == 1:
            return chain()
        with dsl.ParallelFor(list(self._shards), name="shards", parallelism=PARALLEL_SHARDS) as shard:
            self._shard_argument = {"shard": shard}
            output = chain()
        self._shard_argument = {}
        return self.add_step("gathering", parts=dsl.Collected(output))["gathered"]

    @contextmanager
    def if_promoted(self, decision: Artifacts) -> Iterator[None]:
        with dsl.If(decision["Output"] == "promote", name="promoted"):
            yield


def _add_task(step: str, **arguments: object) -> Task:
    """Adds a task of the step's component to the pipeline that is being built."""
    return _component(step)(**arguments)


def _component(step: str) -> Component:
    component: Component = getattr(importlib.import_module(f"components.{step}"), step)
    return component


def _signature(definition: Definition, shards: int) -> inspect.Signature:
    steps = definition.steps_in(shards)
    parameters: dict[str, inspect.Parameter] = {}

    def add(name: str, annotation: object, default: object) -> None:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters.setdefault(name, inspect.Parameter(name, kind, annotation=annotation, default=default))

    for step in steps:
        component_parameters = inspect.signature(_component(step).python_func).parameters
        for setting, parameter in STEP_SPECS[step].parameters.items():
            definition_default = definition.parameters.get(parameter)
            default = component_parameters[setting].default if definition_default is None else definition_default
            required = parameter == "source" and default == ""
            add(parameter, component_parameters[setting].annotation, inspect.Parameter.empty if required else default)
    for name in (*(f"{step}_settings" for step in (*steps, TRACKING_TASK)), *(f"{step}_fingerprint" for step in steps)):
        add(name, str, "")
    add("fingerprints", str, "{}")
    # Python requires parameters without a default to come first.
    return inspect.Signature(sorted(parameters.values(), key=lambda each: each.default is not inspect.Parameter.empty))


def load_package(recipe: Recipe, platform: Platform, arguments: Mapping[str, object], path: Path | None = None) -> str:
    """Returns the YAML to submit: compiled now, or read from `path`.

    Raises ConfigError if the file does not fit the recipe, the platform and the arguments.
    """
    if path is None:
        return compile_pipeline(recipe, platform)
    try:
        text = path.read_text(encoding="utf-8")
        documents = load_all_yaml(text, max_characters=_MAX_CHARACTERS)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())}); compile it again") from error
    spec = documents[0] if documents and isinstance(documents[0], dict) else {}
    pipeline_info, root = spec.get("pipelineInfo"), spec.get("root")
    if "sdkVersion" not in spec or not isinstance(pipeline_info, dict) or not isinstance(root, dict):
        raise ConfigError(f"{path}: is not a compiled pipeline; write one with cappy pipeline compile --on {platform}")
    _refuse_newer_sdk(path, str(spec["sdkVersion"]))
    if len(documents) != (2 if platform == "kubeflow" else 1) or (platform == "vertex" and RUN_ID_PLACEHOLDER in text):
        raise ConfigError(f"{path}: was compiled for another platform; compile it with --on {platform}")
    expected = PIPELINES[recipe.pipeline].kfp_name
    if (name := pipeline_info.get("name")) != expected:
        raise ConfigError(
            f"{path}: is pipeline {quote(name)}, but the recipe's is {expected}; compile it from this recipe"
        )
    if _shards(spec) != shards_of(recipe.shards):
        raise ConfigError(f"{path}: does not have the recipe's {recipe.shards} shards; compile it from this recipe")
    if _OLD_IMPORT in text:
        raise ConfigError(
            f"{path}: was compiled by an earlier version of cappy, which the images cannot run; compile it again"
        )
    parameters = (root.get("inputDefinitions") or {}).get("parameters") or {}
    if unknown := set(arguments) - set(parameters):
        remedy = "compile it again"
        raise ConfigError(f"{path}: has no parameter {min(unknown)}: another version of cappy compiled it; {remedy}")
    return text


def _shards(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """The shards of a compiled pipeline, read from its loop; without a loop, one shard with an empty name."""
    graphs = [each.get("dag", {}).get("tasks", {}) for each in (spec["root"], *spec.get("components", {}).values())]
    loops = [task["parameterIterator"] for tasks in graphs for task in tasks.values() if "parameterIterator" in task]
    return tuple(json.loads(loops[0]["items"]["raw"])) if loops else ("",)


def _refuse_newer_sdk(path: Path, sdk: str) -> None:
    """Raises ConfigError if the file was compiled by a newer kfp, whose fields the installed one may not know."""
    installed = version("kfp")
    try:
        newer = _version_numbers(sdk.removeprefix("kfp-")) > _version_numbers(installed)
    except ValueError as error:
        raise ConfigError(f"{path}: sdkVersion {quote(sdk)} is not a version of kfp; compile it again") from error
    if newer:
        raise ConfigError(
            f"{path}: was compiled by {sdk}, newer than the installed kfp {installed}; compile it again here"
        )


def _version_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))
