"""The four pipelines: which steps each has, which choices a person makes for it, and how the steps are chained.

A definition knows no kfp: `chain` is given a `Graph` and says which step reads what of which. `pipelines.builder` makes
kfp tasks of it. To add a pipeline: a definition in `PIPELINES` here, and its name
in `Recipe.pipeline`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from cappy.errors import ConfigError, quote
from cappy.steps import STEP_SPECS

MAX_SHARDS = 64
"""Vertex AI collects about a hundred artifacts at most, and Kubeflow slows down with large graphs."""
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
"""Choice -> the settings that it decides, of those steps that the pipeline has; `scorer` differs by pipeline."""
SEEDS = ("split_seed", "sampling_seed", "training_seed")
"""Choices that are `seed` where they are None. Evaluation keeps its own: folds and examples do not move with a run."""


class Graph(Protocol):
    """What a definition may ask of the graph that is being built."""

    def run(self, step: str, **inputs: object) -> Artifacts:
        """Adds a step that reads these artifacts; its outputs by name."""
        ...

    def each_shard(self, chain: Callable[[], object]) -> object:
        """The artifact that `chain` makes: of all shards gathered into one, where there are several."""
        ...

    def if_promoted(self, decided: Artifacts) -> AbstractContextManager[None]:
        """What is added inside runs only where the gate promoted."""
        ...


@dataclass(frozen=True, kw_only=True)
class Definition:
    """A pipeline; `choices` are a person's, each with its default, and `scorer_of` is the step that `scorer` is for.

    `fixed` are further settings, given the choices; what a person says step by step stands above all.
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
        """The steps in order, with `gathering` after the last sharded one where shards come together."""
        if shards == 1:
            return self.steps
        last = max(index for index, step in enumerate(self.steps) if STEP_SPECS[step].sharded)
        return (*self.steps[: last + 1], "gathering", *self.steps[last + 1 :])

    def settings(
        self, choices: Mapping[str, object], more: Mapping[str, StepSettings] | None = None, tracking_uri: str = ""
    ) -> Settings:
        """The settings of each step for a person's choices; `more` adds others, step by step.

        ConfigError for a choice that the pipeline has not, or a needed one that is missing.
        """
        if unknown := set(choices) - set(self.choices):
            names = ", ".join(sorted(self.choices))
            raise ConfigError(f"parameters: {self.name} has no {quote(min(unknown))}; there are {names}")
        chosen = {**self.choices, **choices, "tracking_uri": tracking_uri}
        if "generator" in chosen:
            chosen["generator"] = _generators(chosen["generator"])
        for name in SEEDS:
            if name in chosen and chosen[name] is None:
                chosen[name] = chosen["seed"]
        targets = {**TARGETS, "scorer": [(self.scorer_of, "scorer")]}
        settings: Settings = {step: {} for step in self.steps}
        for choice, value in chosen.items():
            for step, setting in targets.get(choice, ()):
                if step in settings:
                    settings[step][setting] = value
        for step, values in [*self.fixed(chosen).items(), *(more or {}).items()]:
            if step in settings:
                settings[step].update(values)
        if not settings["preparation"]["source"]:
            remedy = "give source: FILE under parameters, or --set preparation.source=FILE"
            raise ConfigError(f"{self.name}: no source of instances; {remedy}")
        return settings


def _generators(given: object) -> list[str]:
    """The generators that a person named: a list of specs, or one; ConfigError for anything else."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, Sequence) or not all(isinstance(one, str) for one in given):
        raise ConfigError(f"generator: is a list of LLMs, got {quote(given)}; give such as [builtin]")
    return list(given)


def _sample_and_annotate(graph: Graph) -> object:
    """The front of every pipeline that samples: instances, candidates and labels."""
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
    decided = graph.run("promotion", version=version, report=report)
    with graph.if_promoted(decided):
        graph.run("deployment", version=version, report=report)


def _pretrain(graph: Graph) -> None:
    annotated = _sample_and_annotate(graph)
    scorer = graph.run("pretraining", annotated=annotated)["pretrained"]
    report = graph.run("evaluation", annotated=annotated, scorer=scorer)["report"]
    graph.run("registration", scorer=scorer, report=report)


def _pretraining_pool(choices: Mapping[str, object]) -> Settings:
    """The built-in pretraining pool keeps its test prompts for adaptation: it is judged on validation."""
    if choices["source"] != BUILTIN:
        return {}
    return {"preparation": {"pool": "pretraining"}, "evaluation": {"split": "validation"}}


def _evaluate(graph: Graph) -> None:
    graph.run("evaluation", annotated=_sample_and_annotate(graph))


def _batch_score(graph: Graph) -> None:
    prepared = graph.run("preparation")
    graph.each_shard(lambda: graph.run("scoring", instances=prepared["instances"])["scored"])


def _as_they_are(_: Mapping[str, object]) -> Settings:
    """Rows that are only scored: nothing is held out, and no reference is needed."""
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
            fixed=_pretraining_pool,
        ),
        Definition(
            name="evaluate",
            description="A registered scorer, measured: sample, annotate, evaluate.",
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
            fixed=_as_they_are,
        ),
    )
}
"""Every pipeline by name."""


def shards_of(count: int) -> tuple[str, ...]:
    """The shards i/N of the sharded steps; one that is all has no name."""
    return tuple(f"{index}/{count}" for index in range(count)) if count > 1 else ("",)
