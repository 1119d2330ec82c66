"""The four pipelines: the steps and parameters of each, and how its steps are connected.

A definition does not use kfp: `chain` adds steps to a `Graph`, for which `pipelines.builder` creates kfp tasks.
To add a pipeline, add its definition to `PIPELINES` and its name to `Recipe.pipeline`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cappy.errors import ConfigError, quote
from cappy.steps import STEP_SPECS

MAX_SHARDS = 64
"""Vertex AI collects at most about a hundred artifacts, and Kubeflow slows down with large graphs."""
BUILTIN = "builtin"
CHAMPION = "models:/cappy@champion"
_RECORDED = "recorded:"

StepSettings = Mapping[str, object]
"""Setting -> value, of one step."""
Settings = dict[str, dict[str, object]]
"""Step -> setting -> value."""
Artifacts = Mapping[str, object]
"""Output name -> artifact of a task."""
PARAMETER_SETTINGS: Mapping[str, Sequence[tuple[str, str]]] = {
    "source": [("preparation", "source")],
    "generator": [("sampling", "generator")],
    "strategy": [("sampling", "strategy")],
    "metric": [("annotation", "metric"), ("pretraining", "metric"), ("finetuning", "metric"), ("evaluation", "metric")],
    "name": [("registration", "name")],
    "margin": [("promotion", "margin")],
    "split_seed": [("preparation", "seed")],
    "sampling_seed": [("sampling", "seed")],
    "training_seed": [("pretraining", "seed"), ("finetuning", "seed")],
    "tracking_uri": [("registration", "tracking_uri"), ("promotion", "tracking_uri"), ("deployment", "tracking_uri")],
}
"""Parameter -> the (step, setting) pairs that it sets, if the pipeline has the step. Without `scorer`, which differs by
pipeline."""
SEEDS = ("split_seed", "sampling_seed", "training_seed")
"""Parameters whose default is `seed`. Evaluation has its own seed, so that folds and examples stay the same."""


TRACKING_TASK = "tracking"
"""The exit task of kfp pipelines, which writes the run to MLflow, even if a step failed."""


class Graph(Protocol):
    """The graph to which a definition adds its steps."""

    def add_step(self, step: str, **inputs: object) -> Artifacts:
        """Adds a step that reads these artifacts; returns its outputs by name."""
        ...

    def for_each_shard(self, chain: Callable[[], object]) -> object:
        """Adds the steps of `chain` once, or for each of several shards and then `gathering`; returns the artifact."""
        ...

    def if_promoted(self, decision: Artifacts) -> AbstractContextManager[None]:
        """Steps that are added in this block run only if the decision is to promote."""
        ...


@dataclass(frozen=True, kw_only=True)
class Definition:
    """A pipeline; `parameters` maps its parameters to defaults, `scorer_step` is the step that reads `scorer`.

    `chain` adds the steps to a graph. `extra_settings` returns further settings that depend on the parameters; the
    user's settings of a step override them.
    """

    name: str
    description: str
    steps: tuple[str, ...]
    chain: Callable[[Graph], None]
    parameters: Mapping[str, object]
    scorer_step: str = ""
    extra_settings: Callable[[Mapping[str, object]], Settings] = field(default=lambda parameters: {})

    @property
    def kfp_name(self) -> str:
        """The name that Kubeflow and Vertex AI show."""
        return f"cappy-{self.name.replace('_', '-')}"

    def steps_in(self, shards: int = 1) -> tuple[str, ...]:
        """The steps in order; with several shards `gathering` follows the last sharded step."""
        if shards == 1:
            return self.steps
        last = max(index for index, step in enumerate(self.steps) if STEP_SPECS[step].sharded)
        return (*self.steps[: last + 1], "gathering", *self.steps[last + 1 :])

    def settings(
        self,
        parameters: Mapping[str, object],
        overrides: Mapping[str, StepSettings] | None = None,
        tracking_uri: str = "",
    ) -> Settings:
        """The settings of each step for these parameters; `overrides` replaces or adds settings by step.

        Raises ConfigError if a parameter is unknown, or a required one is missing.
        """
        if unknown := set(parameters) - set(self.parameters):
            names = ", ".join(sorted(self.parameters))
            raise ConfigError(f"parameters: {self.name} has no {quote(min(unknown))}; choose from {names}")
        complete = {**self.parameters, **parameters, "tracking_uri": tracking_uri}
        if "generator" in complete:
            complete["generator"] = _generator_list(complete["generator"])
        for name in SEEDS:
            if name in complete and complete[name] is None:
                complete[name] = complete["seed"]
        targets = {**PARAMETER_SETTINGS, "scorer": [(self.scorer_step, "scorer")]}
        settings: Settings = {step: {} for step in self.steps}
        for parameter, value in complete.items():
            for step, setting in targets.get(parameter, ()):
                if step in settings:
                    settings[step][setting] = value
        for step, values in [*self.extra_settings(complete).items(), *(overrides or {}).items()]:
            if step in settings:
                settings[step].update(values)
        for name, value in _settings_for_recorded_source(settings).items():
            settings["preparation"].setdefault(name, value)
        if "finetuning" in settings and "evaluation" in settings:
            # The report shows what adaptation gained.
            settings["evaluation"].setdefault("initial", settings["finetuning"]["scorer"])
        if not settings["preparation"]["source"]:
            remedy = "give source: FILE under parameters, or --set preparation.source=FILE"
            raise ConfigError(f"{self.name}: no source of instances; {remedy}")
        return settings


def _settings_for_recorded_source(settings: Settings) -> dict[str, object]:
    """Settings of preparation if the source is also a file of recorded samples: sampling adds its responses."""
    generators = settings.get("sampling", {}).get("generator", ())
    source = Path(str(settings["preparation"]["source"]))
    paths = [Path(text.removeprefix(_RECORDED)) for text in map(str, generators) if text.startswith(_RECORDED)]  # type: ignore[call-overload]
    if source.absolute() not in [path.absolute() for path in paths]:
        return {}
    return {"exclude": ["*"]} if source.is_dir() else {"exclude": ["*"], "group_responses": "always"}


def _generator_list(value: object) -> list[str]:
    """The generators as a list of specs; raises ConfigError if `value` is neither a spec nor a list of specs."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, Sequence) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"generator: expected a list of LLMs, got {quote(value)}; give for example [builtin]")
    return list(value)


def _sample_and_annotate(graph: Graph) -> object:
    """Adds preparation, sampling and annotation; returns the annotated dataset."""
    prepared = graph.add_step("preparation")

    def sample_and_annotate() -> object:
        sampled = graph.add_step("sampling", instances=prepared["instances"])
        return graph.add_step("annotation", candidates=sampled["candidates"])["annotated"]

    return graph.for_each_shard(sample_and_annotate)


def _adapt(graph: Graph) -> None:
    annotated = _sample_and_annotate(graph)
    scorer = graph.add_step("finetuning", annotated=annotated)["finetuned"]
    report = graph.add_step("evaluation", annotated=annotated, scorer=scorer)["report"]
    version = graph.add_step("registration", scorer=scorer, report=report)["version"]
    decision = graph.add_step("promotion", version=version, report=report)
    with graph.if_promoted(decision):
        graph.add_step("deployment", version=version, report=report)


def _pretrain(graph: Graph) -> None:
    annotated = _sample_and_annotate(graph)
    scorer = graph.add_step("pretraining", annotated=annotated)["pretrained"]
    report = graph.add_step("evaluation", annotated=annotated, scorer=scorer)["report"]
    graph.add_step("registration", scorer=scorer, report=report)


def _pretraining_settings(parameters: Mapping[str, object]) -> Settings:
    """The test prompts of the built-in tasks are reserved for adaptation, so pretraining is evaluated on validation."""
    if parameters["source"] != BUILTIN:
        return {}
    return {"preparation": {"pool": "pretraining"}, "evaluation": {"split": "validation"}}


def _evaluate(graph: Graph) -> None:
    graph.add_step("evaluation", annotated=_sample_and_annotate(graph))


def _batch_score(graph: Graph) -> None:
    prepared = graph.add_step("preparation")
    graph.for_each_shard(lambda: graph.add_step("scoring", instances=prepared["instances"])["scored"])


def _unlabelled_settings(parameters: Mapping[str, object]) -> Settings:
    """Instances that are only scored need no held-out splits and no references."""
    return {"preparation": {"unlabelled": True, "test": 0.0, "validation": 0.0}}


_SAMPLING = {
    "source": BUILTIN,
    "generator": [BUILTIN],
    "strategy": "",
    "metric": "rougeL",
    "seed": 0,
    "split_seed": None,
    "sampling_seed": None,
}

PIPELINES: Mapping[str, Definition] = {
    definition.name: definition
    for definition in (
        Definition(
            name="adapt",
            description="A scorer for one task: sample, annotate, finetune, promote.",
            steps=(
                "preparation",
                "sampling",
                "annotation",
                "finetuning",
                "evaluation",
                "registration",
                "promotion",
                "deployment",
            ),
            chain=_adapt,
            parameters={**_SAMPLING, "training_seed": None, "scorer": BUILTIN, "name": "cappy", "margin": 0.0},
            scorer_step="finetuning",
        ),
        Definition(
            name="pretrain",
            description="A general scorer: sample, annotate, pretrain, register.",
            steps=("preparation", "sampling", "annotation", "pretraining", "evaluation", "registration"),
            chain=_pretrain,
            parameters={**_SAMPLING, "training_seed": None, "name": "cappy-pretrained"},
            extra_settings=_pretraining_settings,
        ),
        Definition(
            name="evaluate",
            description="The quality of a registered scorer: sample, annotate, evaluate.",
            steps=("preparation", "sampling", "annotation", "evaluation"),
            chain=_evaluate,
            parameters={**_SAMPLING, "scorer": CHAMPION},
            scorer_step="evaluation",
        ),
        Definition(
            name="batch_score",
            description="A dataset scored by a registered scorer.",
            steps=("preparation", "scoring"),
            chain=_batch_score,
            parameters={"source": "", "scorer": CHAMPION, "seed": 0, "split_seed": None},
            scorer_step="scoring",
            extra_settings=_unlabelled_settings,
        ),
    )
}
"""Name -> pipeline."""


def shards_of(count: int) -> tuple[str, ...]:
    """The names of `count` shards, `i/N` with i from 0; a single shard has the empty name."""
    return tuple(f"{index}/{count}" for index in range(count)) if count > 1 else ("",)
