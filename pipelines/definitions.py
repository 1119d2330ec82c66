"""The four pipelines: the steps and parameters of each, and how its steps are connected.

A definition does not use kfp: `chain` adds steps to a `Graph`, for which `pipelines.builder` creates kfp tasks.
To add a pipeline, add its definition to `PIPELINES` and its name to `Recipe.pipeline`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from cappy.errors import ConfigError, quote
from cappy.steps import STEP_SPECS

MAX_SHARDS = 64
"""Vertex AI collects at most about a hundred artifacts, and Kubeflow slows down with large graphs."""
BUILTIN = "builtin"
CHAMPION = "models:/cappy@champion"

StepSettings = Mapping[str, object]
"""Setting -> value, of one step."""
Settings = dict[str, dict[str, object]]
"""Step -> setting -> value."""
Artifacts = Mapping[str, object]
"""Output name -> artifact of a task."""
TARGETS: Mapping[str, Sequence[tuple[str, str]]] = {
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
"""Parameter -> the settings that it sets, in those steps that the pipeline has; `scorer` differs by pipeline."""
SEEDS = ("split_seed", "sampling_seed", "training_seed")
"""Parameters that default to `seed`. Evaluation has its own seed, so that folds and examples stay the same."""


class Graph(Protocol):
    """The graph to which a definition adds its steps."""

    def run(self, step: str, **inputs: object) -> Artifacts:
        """Adds a step that reads these artifacts; returns its outputs by name."""
        ...

    def each_shard(self, chain: Callable[[], object]) -> object:
        """The artifact that `chain` returns; with several shards it runs for each, and the results are gathered."""
        ...

    def if_promoted(self, decision: Artifacts) -> AbstractContextManager[None]:
        """Steps added in this block run only if the gate promoted."""
        ...


@dataclass(frozen=True, kw_only=True)
class Definition:
    """A pipeline; `choices` are its parameters with their defaults, `scorer_of` is the step that reads `scorer`.

    `fixed` returns further settings for given parameters; the user's settings of a step override them.
    """

    name: str
    description: str
    steps: tuple[str, ...]
    chain: Callable[[Graph], None]
    choices: Mapping[str, object]
    scorer_of: str = ""
    fixed: Callable[[Mapping[str, object]], Settings] = field(default=lambda choices: {})

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
        self, choices: Mapping[str, object], overrides: Mapping[str, StepSettings] | None = None, tracking_uri: str = ""
    ) -> Settings:
        """The settings of each step for these parameters; `overrides` replaces or adds settings by step.

        ConfigError for an unknown parameter, or a missing required one.
        """
        if unknown := set(choices) - set(self.choices):
            names = ", ".join(sorted(self.choices))
            raise ConfigError(f"parameters: {self.name} has no {quote(min(unknown))}; choose from {names}")
        parameters = {**self.choices, **choices, "tracking_uri": tracking_uri}
        if "generator" in parameters:
            parameters["generator"] = _generator_list(parameters["generator"])
        for name in SEEDS:
            if name in parameters and parameters[name] is None:
                parameters[name] = parameters["seed"]
        targets = {**TARGETS, "scorer": [(self.scorer_of, "scorer")]}
        settings: Settings = {step: {} for step in self.steps}
        for choice, value in parameters.items():
            for step, setting in targets.get(choice, ()):
                if step in settings:
                    settings[step][setting] = value
        for step, values in [*self.fixed(parameters).items(), *(overrides or {}).items()]:
            if step in settings:
                settings[step].update(values)
        if not settings["preparation"]["source"]:
            remedy = "give source: FILE under parameters, or --set preparation.source=FILE"
            raise ConfigError(f"{self.name}: no source of instances; {remedy}")
        return settings


def _generator_list(value: object) -> list[str]:
    """The generators as a list of specs; ConfigError if `value` is neither a spec nor a list of specs."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, Sequence) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"generator: expected a list of LLMs, got {quote(value)}; give for example [builtin]")
    return list(value)


def _sample_and_annotate(graph: Graph) -> object:
    """The first steps of every pipeline that samples: preparation, sampling and annotation."""
    prepared = graph.run("preparation")

    def sample_and_annotate() -> object:
        sampled = graph.run("sampling", instances=prepared["instances"])
        return graph.run("annotation", candidates=sampled["candidates"])["annotated"]

    return graph.each_shard(sample_and_annotate)


def _adapt(graph: Graph) -> None:
    annotated = _sample_and_annotate(graph)
    scorer = graph.run("finetuning", annotated=annotated)["finetuned"]
    report = graph.run("evaluation", annotated=annotated, scorer=scorer)["report"]
    version = graph.run("registration", scorer=scorer, report=report)["version"]
    decision = graph.run("promotion", version=version, report=report)
    with graph.if_promoted(decision):
        graph.run("deployment", version=version, report=report)


def _pretrain(graph: Graph) -> None:
    annotated = _sample_and_annotate(graph)
    scorer = graph.run("pretraining", annotated=annotated)["pretrained"]
    report = graph.run("evaluation", annotated=annotated, scorer=scorer)["report"]
    graph.run("registration", scorer=scorer, report=report)


def _pretraining_settings(choices: Mapping[str, object]) -> Settings:
    """The test prompts of the built-in tasks are reserved for adaptation, so pretraining is evaluated on validation."""
    if choices["source"] != BUILTIN:
        return {}
    return {"preparation": {"pool": "pretraining"}, "evaluation": {"split": "validation"}}


def _evaluate(graph: Graph) -> None:
    graph.run("evaluation", annotated=_sample_and_annotate(graph))


def _batch_score(graph: Graph) -> None:
    prepared = graph.run("preparation")
    graph.each_shard(lambda: graph.run("scoring", instances=prepared["instances"])["scored"])


def _unlabelled_settings(_: Mapping[str, object]) -> Settings:
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
            choices={**_SAMPLING, "training_seed": None, "scorer": BUILTIN, "name": "cappy", "margin": 0.0},
            scorer_of="finetuning",
        ),
        Definition(
            name="pretrain",
            description="A general scorer: sample, annotate, pretrain, register.",
            steps=("preparation", "sampling", "annotation", "pretraining", "evaluation", "registration"),
            chain=_pretrain,
            choices={**_SAMPLING, "training_seed": None, "name": "cappy-pretrained"},
            fixed=_pretraining_settings,
        ),
        Definition(
            name="evaluate",
            description="The quality of a registered scorer: sample, annotate, evaluate.",
            steps=("preparation", "sampling", "annotation", "evaluation"),
            chain=_evaluate,
            choices={**_SAMPLING, "scorer": CHAMPION},
            scorer_of="evaluation",
        ),
        Definition(
            name="batch_score",
            description="A dataset scored by a registered scorer.",
            steps=("preparation", "scoring"),
            chain=_batch_score,
            choices={"source": "", "scorer": CHAMPION, "seed": 0, "split_seed": None},
            scorer_of="scoring",
            fixed=_unlabelled_settings,
        ),
    )
}
"""Every pipeline by name."""


def shards_of(count: int) -> tuple[str, ...]:
    """The shards i/N of the sharded steps; a single shard has the empty name."""
    return tuple(f"{index}/{count}" for index in range(count)) if count > 1 else ("",)
