"""The steps: one `StepSpec` each. Everything that needs to know something about a step reads it here.

To add a step: its spec here, its module (a config class and `run`), its component in `components/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """What the command line, the components, the pipelines and the work folder know about one step.

    `module` has the config class, named after the step (`SamplingConfig`), and `run(config, progress) -> Manifest`.
    `version` is part of the key of every piece of work (`cappy.keys`): raise it when the step's results change, and
    finished work of the version before is not taken for this one's. tests/test_step_versions.py fails where results
    change under the same version.

    Of the settings, `artifacts` are filled with folders by a pipeline; `parameters` are parameters of the component,
    each with the name that it has in a pipeline, and all others travel encoded; `outside` name something whose content
    may change while the text stays: a file, a folder, built-in weights, a registered version.
    """

    name: str
    module: str
    help: str
    version: int
    artifacts: tuple[str, ...]
    parameters: Mapping[str, str] = field(default_factory=dict)
    outside: tuple[str, ...] = ()
    sharded: bool = False
    cached: bool = True
    trains: bool = False


STEP_SPECS: Mapping[str, StepSpec] = {
    spec.name: spec
    for spec in (
        StepSpec(
            name="preparation",
            module="cappy.preparation.step",
            help="Turn sources into instances.",
            version=1,
            artifacts=("target",),
            parameters={"source": "source", "seed": "split_seed"},
            outside=("source", "templates", "local", "against"),
        ),
        StepSpec(
            name="sampling",
            module="cappy.sampling.step",
            help="Let LLMs propose candidates for every instance.",
            version=1,
            artifacts=("source", "target"),
            parameters={"generator": "generator", "strategy": "strategy", "seed": "sampling_seed"},
            outside=("generator",),
            sharded=True,
        ),
        StepSpec(
            name="annotation",
            module="cappy.annotation.step",
            help="Label every candidate with its correctness, 0 to 1.",
            version=1,
            artifacts=("source", "target"),
            parameters={"metric": "metric"},
            sharded=True,
        ),
        StepSpec(
            name="scoring",
            module="cappy.scoring.step",
            help="Score the candidates of a dataset.",
            version=1,
            artifacts=("source", "target"),
            parameters={"scorer": "scorer"},
            outside=("scorer",),
            sharded=True,
        ),
        StepSpec(
            name="gathering",
            module="cappy.records.gathering",
            help="Join the folders that shards of a step wrote.",
            version=1,
            artifacts=("source", "target"),
        ),
        StepSpec(
            name="pretraining",
            module="cappy.training.pretraining",
            help="Train a scorer on labelled candidates of many tasks.",
            version=1,
            artifacts=("source", "target"),
            parameters={"seed": "training_seed"},
            outside=("encoder",),
            trains=True,
        ),
        StepSpec(
            name="finetuning",
            module="cappy.training.finetuning",
            help="Train a scorer further on one task.",
            version=1,
            artifacts=("source", "target"),
            parameters={"scorer": "scorer", "seed": "training_seed"},
            outside=("scorer",),
            trains=True,
        ),
        StepSpec(
            name="evaluation",
            module="cappy.evaluation.step",
            help="Compare the scorer with other selectors; write the report.",
            version=1,
            artifacts=("source", "scorer", "target"),
            parameters={"champion": "champion", "metric": "metric"},
            outside=("champion", "scorer"),
        ),
        StepSpec(
            name="registration",
            module="cappy.registry.registration",
            help="Register the scorer in MLflow as the challenger.",
            version=1,
            artifacts=("scorer", "report", "target"),
            parameters={"name": "name"},
            cached=False,
        ),
        StepSpec(
            name="promotion",
            module="cappy.registry.promotion",
            help="Let the gate decide whether the challenger is the champion.",
            version=1,
            artifacts=("version", "report", "target"),
            parameters={"margin": "margin"},
            cached=False,
        ),
        StepSpec(
            name="deployment",
            module="cappy.deployment.step",
            help="Check that the registered version answers; say how to serve.",
            version=1,
            artifacts=("version", "report", "target"),
            cached=False,
        ),
    )
}
"""Every step by name, in the order of a run."""


def step_version(step: str) -> int:
    """The present version of a step."""
    return STEP_SPECS[step].version


TRAINING_STEPS = tuple(name for name, spec in STEP_SPECS.items() if spec.trains)
