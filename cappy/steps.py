"""The steps, one `StepSpec` each. Every table about steps is derived from these.

To add a step, add its spec here, its module (a config class and `run`) and its component in `components/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """The properties of one step, for the command line, the components, the pipelines and the work folder.

    `module` is the module with the config class, named after the step (`SamplingConfig`), and with
    `run(config, progress) -> Manifest`. `version` is part of the key of every piece of work (`cappy.keys`): raise it
    when the step's results change, so that finished work of earlier versions is not reused. tests/test_step_versions.py
    fails if results change under the same version.

    A pipeline sets the settings in `artifacts` to folders. Settings in `parameters` are parameters of the component,
    each with its name in a pipeline; all others are passed in one text (`cappy.config.encode`). Settings in
    `external_settings` name something whose content may change while its name stays the same: a file, a folder,
    built-in weights, a registered version. A `sharded` step can be split over several tasks. A `cached` step may be
    taken from the orchestrator's cache. A step that `trains` writes a scorer.
    """

    name: str
    module: str
    help: str
    version: int
    artifacts: tuple[str, ...]
    parameters: Mapping[str, str] = field(default_factory=dict)
    external_settings: tuple[str, ...] = ()
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
            external_settings=("source", "templates", "local", "against"),
        ),
        StepSpec(
            name="sampling",
            module="cappy.sampling.step",
            help="Let LLMs propose candidates for every instance.",
            version=1,
            artifacts=("source", "target"),
            parameters={"generator": "generator", "strategy": "strategy", "seed": "sampling_seed"},
            external_settings=("generator",),
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
            external_settings=("scorer",),
            sharded=True,
        ),
        StepSpec(
            name="gathering",
            module="cappy.records.gathering",
            help="Join the folders that the shards of a step wrote.",
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
            external_settings=("encoder",),
            trains=True,
        ),
        StepSpec(
            name="finetuning",
            module="cappy.training.finetuning",
            help="Train a scorer further on one task.",
            version=1,
            artifacts=("source", "target"),
            parameters={"scorer": "scorer", "seed": "training_seed"},
            external_settings=("scorer",),
            trains=True,
        ),
        StepSpec(
            name="evaluation",
            module="cappy.evaluation.step",
            help="Compare the scorer with other selectors; write the report.",
            version=2,
            artifacts=("source", "scorer", "target"),
            parameters={"champion": "champion", "metric": "metric"},
            external_settings=("champion", "scorer"),
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
            help="Let the gate decide whether to promote the challenger.",
            version=1,
            artifacts=("version", "report", "target"),
            parameters={"margin": "margin"},
            cached=False,
        ),
        StepSpec(
            name="deployment",
            module="cappy.deployment.step",
            help="Check the scores of the registered version and deploy it.",
            version=1,
            artifacts=("version", "report", "target"),
            cached=False,
        ),
    )
}
"""Every step by name, in the order in which a pipeline runs them."""


def step_version(step: str) -> int:
    """The current version of a step."""
    return STEP_SPECS[step].version


TRAINING_STEPS = tuple(name for name, spec in STEP_SPECS.items() if spec.trains)
