"""The steps, one `StepSpec` each, and the keys of their work. Every table about steps is derived from the specs.

To add a step, add its spec here, its module (a config class and `run`) and its component in `components/`.

One function computes both the name of a folder under the work folder and the fingerprint for an orchestrator's cache,
so both agree on which work is the same. The key contains the step's `version` instead of a hash of the code, so that an
edited comment does not invalidate finished work.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """The properties of one step, for the command line, the components, the pipelines and the work folder.

    `module` is the module with the config class, named after the step (`SamplingConfig`), and with
    `run(config, progress) -> Manifest`. `version` is part of the key of every piece of work (`cappy.steps`): raise it
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
            version=2,
            artifacts=("target",),
            parameters={"source": "source", "seed": "split_seed"},
            external_settings=("source", "templates", "local", "against"),
        ),
        StepSpec(
            name="sampling",
            module="cappy.sampling.step",
            help="Let LLMs propose candidates for every instance.",
            version=2,
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
            version=2,
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
            version=5,
            artifacts=("source", "scorer", "target"),
            parameters={"champion": "champion", "metric": "metric"},
            external_settings=("champion", "initial", "scorer"),
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


KEY = "key.json"
"""Name of the key's file in the folder of a piece of work."""
MAX_VALUE_CHARACTERS = 60


@dataclass(frozen=True, kw_only=True)
class Key:
    """Identifies a piece of work; `inputs` are hashes of what it reads, in an order that the step defines.

    `fresh` is the name of the run that asked to redo the work (`--fresh`), empty if none did. `finished` is whether the
    work was published. Neither is part of the digest.
    """

    step: str
    version: int
    settings: Mapping[str, object] = field(default_factory=dict)
    inputs: Sequence[object] = ()
    fresh: str = ""
    finished: bool = False

    @property
    def digest(self) -> str:
        """Hexadecimal sha256 of step, version, settings and inputs."""
        values = [self.step, self.version, dict(self.settings), list(self.inputs)]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @property
    def name(self) -> str:
        """The name of the work's folder: the first 24 digits of the digest."""
        return self.digest[:24]

    def to_json(self) -> str:
        """The text of key.json."""
        return json.dumps(asdict(self), indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str) -> "Key":
        """Parses the key that `to_json` wrote. Raises ValueError or TypeError if the text is not a key."""
        key = Key(**json.loads(text))
        if not isinstance(key.settings, dict) or not isinstance(key.inputs, list):
            raise TypeError("settings is not an object, or inputs is not a list")
        return key

    def differences(self, other: "Key") -> list[str]:
        """The differences from `other` to this key as texts, such as `temperature 0.9 -> 1.0`."""
        texts = [] if self.version == other.version else [f"version {other.version} -> {self.version}"]
        for name in sorted({*self.settings, *other.settings}):
            old, new = other.settings.get(name), self.settings.get(name)
            if old != new:
                texts.append(f"{name.replace('_', '-')} {_format_value(old)} -> {_format_value(new)}")
        if list(self.inputs) != list(other.inputs):
            texts.append("inputs")
        return texts


def work_key(step: str, settings: Mapping[str, object], inputs: Sequence[object] = (), *, fresh: str = "") -> Key:
    """The key of a piece of work with the current version of the step.

    `fresh` is the name of the run that asks to redo the work (`--fresh`), empty if it may be reused.
    """
    return Key(step=step, version=step_version(step), settings=dict(settings), inputs=list(inputs), fresh=fresh)


def _format_value(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_VALUE_CHARACTERS else f"{text[:MAX_VALUE_CHARACTERS]}..."
