"""From a definition to kfp: the pipeline of a recipe, and the YAML that Kubeflow and Vertex AI take."""

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
from components.component import Component, Task
from pipelines.customize import TaskCustomizer, customizer_for
from pipelines.definitions import PIPELINES, Artifacts, Definition, shards_of
from pipelines.recipe import Platform, Recipe

RUN = dsl.PIPELINE_JOB_ID_PLACEHOLDER
JOB_ID = "{{$.pipeline_job_uuid}}"
"""What Vertex AI's YAML names a run by no more; see `compile_pipeline`."""
_MAX_CHARACTERS = 2**23
_OLD_IMPORT = "from cappy.steps import launch"
"""In every component of a pipeline that was compiled before `launch` moved to `cappy.worker`."""
PARALLEL_SHARDS = 16
"""Shards that run at a time on a cluster; kfp's local runner takes two, whatever is asked for."""


class Pipeline(Protocol):
    """A pipeline as kfp makes it: `Compiler` writes it, and a call runs it on kfp's local runner."""

    pipeline_spec: Any

    def __call__(self, **arguments: object) -> object: ...


def build(recipe: Recipe, platform: Platform = "local") -> Pipeline:
    """The kfp pipeline of a recipe, each task customized for the platform; ConfigError for a resource that it lacks."""
    definition, shards = PIPELINES[recipe.pipeline], shards_of(recipe.shards)
    return build_pipeline(definition, shards, customizer_for(platform, recipe))


def build_pipeline(definition: Definition, shards: Sequence[str], customize: TaskCustomizer) -> Pipeline:
    """The kfp pipeline of a definition.

    Its parameters are those of the components by their names in a pipeline (`StepSpec.parameters`), with the
    components' types and the definition's defaults, else the components', and two of each step: `STEP_settings`,
    encoded, and `STEP_fingerprint`. A source that the definition leaves empty must be given.
    """
    signature = _signature(definition, len(shards))

    def pipeline(*values: object) -> None:
        given = dict(zip(signature.parameters, values, strict=True))
        last = _dsl_task("tracking", fingerprints=given["fingerprints"], settings=given["tracking_settings"], run=RUN)
        last.set_caching_options(False)
        customize("tracking", last)
        # kfp names what stands inside by this, and kept runs have it: adapt, batch-score.
        with dsl.ExitHandler(last, name=definition.name.replace("_", "-")):
            definition.chain(_TaskGraph(given, shards, customize))

    pipeline.__name__ = definition.name
    pipeline.__signature__ = signature  # type: ignore[attr-defined]
    decorate: Callable[[Callable[..., None]], Pipeline] = dsl.pipeline(
        name=definition.kfp_name, description=definition.description
    )
    return decorate(pipeline)


def compile_pipeline(recipe: Recipe, platform: Platform = "local") -> str:
    """The YAML of a recipe; needs kfp and nothing heavier. Kubeflow's has a second document, with what pods get."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        Compiler().compile(build(recipe, platform), str(path))
        text = path.read_text(encoding="utf-8")
    if platform == "vertex":
        # The job's id, which the submitter chooses; its number is known inside alone, and MLflow's run is named by it.
        text = text.replace(dsl.PIPELINE_JOB_ID_PLACEHOLDER, dsl.PIPELINE_JOB_NAME_PLACEHOLDER)
    return text


class _TaskGraph:
    """The `Graph` of a definition as kfp tasks; `given` are the pipeline's parameters by name."""

    def __init__(self, given: Mapping[str, object], shards: Sequence[str], customize: TaskCustomizer) -> None:
        self._given, self._shards, self._customize = given, shards, customize
        self._part: dict[str, object] = {}

    def run(self, step: str, **inputs: object) -> Artifacts:
        spec = STEP_SPECS[step]
        own = {
            setting: self._given[parameter]
            for setting, parameter in spec.parameters.items()
            if setting not in inputs and parameter in self._given
        }
        task = _dsl_task(
            step,
            **inputs,
            **own,
            **(self._part if spec.sharded else {}),
            settings=self._given[f"{step}_settings"],
            fingerprint=self._given[f"{step}_fingerprint"],
            run=RUN,
        )
        if not spec.cached:
            task.set_caching_options(False)
        self._customize(step, task)
        return task.outputs

    def each_shard(self, chain: Callable[[], object]) -> object:
        if len(self._shards) == 1:
            return chain()
        with dsl.ParallelFor(list(self._shards), name="shards", parallelism=PARALLEL_SHARDS) as shard:
            self._part = {"part": shard}
            made = chain()
        self._part = {}
        return self.run("gathering", parts=dsl.Collected(made))["gathered"]

    @contextmanager
    def if_promoted(self, decided: Artifacts) -> Iterator[None]:
        with dsl.If(decided["Output"] == "promote", name="promoted"):
            yield


def _dsl_task(step: str, **arguments: object) -> Task:
    """A task of the step's component."""
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
        own = inspect.signature(_component(step).python_func).parameters
        for setting, parameter in STEP_SPECS[step].parameters.items():
            chosen = definition.choices.get(parameter)
            default = own[setting].default if chosen is None else chosen
            needed = parameter == "source" and default == ""
            add(parameter, own[setting].annotation, inspect.Parameter.empty if needed else default)
    for name in (*(f"{step}_settings" for step in (*steps, "tracking")), *(f"{step}_fingerprint" for step in steps)):
        add(name, str, "")
    add("fingerprints", str, "{}")
    # kfp takes them in any order, Python those without a default first.
    return inspect.Signature(sorted(parameters.values(), key=lambda each: each.default is not inspect.Parameter.empty))


def package_of(recipe: Recipe, platform: Platform, arguments: Mapping[str, object], path: Path | None = None) -> str:
    """The YAML to send; a given file must be this recipe's pipeline, of no newer SDK, and take these arguments."""
    if path is None:
        return compile_pipeline(recipe, platform)
    try:
        text = path.read_text(encoding="utf-8")
        documents = load_all_yaml(text, max_characters=_MAX_CHARACTERS)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())}); compile it again") from error
    spec = documents[0] if documents and isinstance(documents[0], dict) else {}
    information, root = spec.get("pipelineInfo"), spec.get("root")
    if "sdkVersion" not in spec or not isinstance(information, dict) or not isinstance(root, dict):
        raise ConfigError(f"{path}: is not a compiled pipeline; write one with cappy pipeline compile --on {platform}")
    _refuse_newer(path, str(spec["sdkVersion"]))
    if len(documents) != (2 if platform == "kubeflow" else 1) or (platform == "vertex" and JOB_ID in text):
        raise ConfigError(f"{path}: was compiled for another platform; compile it with --on {platform}")
    wanted = PIPELINES[recipe.pipeline].kfp_name
    if (name := information.get("name")) != wanted:
        raise ConfigError(f"{path}: is pipeline {quote(name)}, the recipe's is {wanted}; compile it from this recipe")
    if _shards(spec) != shards_of(recipe.shards):
        raise ConfigError(f"{path}: has other shards than the recipe's {recipe.shards}; compile it from this recipe")
    if _OLD_IMPORT in text:
        raise ConfigError(
            f"{path}: an earlier version of cappy wrote it, this one's images cannot run it; compile it again"
        )
    known = (root.get("inputDefinitions") or {}).get("parameters") or {}
    if lacking := set(arguments) - set(known):
        raise ConfigError(f"{path}: takes no {min(lacking)}, another version of cappy wrote it; compile it again")
    return text


def _shards(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """The parts that the pipeline's loop goes over; one that is all where there is no loop."""
    graphs = [each.get("dag", {}).get("tasks", {}) for each in (spec["root"], *spec.get("components", {}).values())]
    loops = [task["parameterIterator"] for tasks in graphs for task in tasks.values() if "parameterIterator" in task]
    return tuple(json.loads(loops[0]["items"]["raw"])) if loops else ("",)


def _refuse_newer(path: Path, sdk: str) -> None:
    """ConfigError where a newer kfp than this one compiled the file: its fields may not be understood."""
    ours = version("kfp")
    try:
        newer = _numbers(sdk.removeprefix("kfp-")) > _numbers(ours)
    except ValueError as error:
        raise ConfigError(f"{path}: sdkVersion {quote(sdk)} is none of kfp; compile it again") from error
    if newer:
        raise ConfigError(f"{path}: was compiled by {sdk}, here is kfp {ours}; compile it again here")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))
