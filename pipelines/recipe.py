"""A recipe: the YAML file that describes a run. It is validated before anything is submitted."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import Field, model_validator

from cappy.config import Cores, Memory, settings
from cappy.errors import ConfigError, quote, suggest
from cappy.redaction import has_secret
from cappy.untrusted import load_yaml
from pipelines.definitions import MAX_SHARDS, PIPELINES, TRACKING_TASK, Settings

Platform = Literal["local", "docker", "kubeflow", "vertex"]
ERROR_TEXTS = {"dict_type": "must hold keys with values, one on each line", "int_type": "must be a whole number"}
"""Type of a pydantic error -> our text, if pydantic's own uses Python's terms."""

Accelerator = Literal[
    "none",
    "nvidia-t4",
    "nvidia-l4",
    "nvidia-a100-40gb",
    "nvidia-a100-80gb",
    "nvidia-h100-80gb",
    "nvidia-h200",
    "tpu-v5e",
    "tpu-v6e",
]

Image = Literal["worker", "worker-cuda", "trainer", "trainer-cuda", "trainer-tpu"]

VERTEX_TYPES: dict[str, str] = {
    "nvidia-t4": "NVIDIA_TESLA_T4",
    "nvidia-l4": "NVIDIA_L4",
    "nvidia-a100-40gb": "NVIDIA_TESLA_A100",
    "nvidia-a100-80gb": "NVIDIA_A100_80GB",
    "nvidia-h100-80gb": "NVIDIA_H100_80GB",
    "nvidia-h200": "NVIDIA_H200_141GB",
}
"""Accelerator -> its name in Vertex AI's AcceleratorType, which has none for TPUs: they belong to machine types."""


GKE_ACCELERATORS: dict[str, str] = {
    "nvidia-t4": "nvidia-tesla-t4",
    "nvidia-l4": "nvidia-l4",
    "nvidia-a100-40gb": "nvidia-tesla-a100",
    "nvidia-a100-80gb": "nvidia-a100-80gb",
    "nvidia-h100-80gb": "nvidia-h100-80gb",
    "nvidia-h200": "nvidia-h200-141gb",
}
"""GPU -> the value of the label cloud.google.com/gke-accelerator of nodes with it, on GKE."""
ACCELERATED_STEPS = ("sampling", "pretraining", "finetuning", "evaluation", "scoring")
"""Steps that run a model."""


def kubernetes_resource(accelerator: str) -> str:
    """The resource name under which a pod requests the accelerator."""
    return "google.com/tpu" if accelerator.startswith("tpu-") else "nvidia.com/gpu"


@settings
class Toleration:
    """A taint that the step's pod tolerates; the fields are those of Kubernetes."""

    key: str
    value: str = ""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] = "NoSchedule"


@settings
class Secret:
    """A secret by name; its value is passed to the step as an environment variable and stored nowhere else.

    On Kubeflow `name` is a Secret of the namespace and `key` one of its entries. On Vertex AI `name` is a secret of
    Secret Manager, projects/P/secrets/S/versions/V, which the step reads with its service account.
    """

    variable: Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")]
    name: Annotated[str, Field(min_length=1)]
    key: str = ""


@settings
class Resources:
    """The resources of one step; if a training step has several nodes, those of each node.

    `cpu` is in cores (2, 0.5, 500m), `memory` in Mi, Gi or Ti (1.5Gi), and `count` is the number of
    accelerators. A step on Kubeflow or Vertex AI is stopped after `hours`; `retries` is how often the platform repeats
    a failed step, which continues from the work folder.
    """

    cpu: Cores = ""
    memory: Memory = ""
    accelerator: Accelerator = "none"
    count: Annotated[int, Field(strict=True, ge=1, le=16)] = 1
    nodes: Annotated[int, Field(strict=True, ge=1, le=1024)] = 1
    spot: bool = False
    hours: Annotated[float, Field(strict=True, gt=0, le=24 * 28)] = 24.0
    retries: Annotated[int, Field(strict=True, ge=0, le=20)] = 2
    machine_type: str = ""
    node_selector: dict[str, str] = Field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()
    secrets: tuple[Secret, ...] = ()
    image: str = ""

    @model_validator(mode="after")
    def _check_count(self) -> "Resources":
        if self.count > 1 and self.accelerator == "none":
            raise ValueError(
                f"count: {self.count} without an accelerator; give one, for example accelerator: nvidia-l4"
            )
        return self


@settings
class Kubeflow:
    """The address of Kubeflow Pipelines, and the settings of every pod of a run.

    `volume` is a ReadWriteMany PersistentVolumeClaim; it is mounted at `mount` and holds the work folder. `runtime` is
    the TrainingRuntime of steps that train on several nodes. `spot` is the label of spot nodes, which is also their
    taint, and `accelerator_labels` has the labels of nodes with each accelerator; the defaults are GKE's. A label in a
    step's own `node_selector` takes precedence.
    """

    endpoint: str = ""
    namespace: str = "kubeflow"
    experiment: str = "cappy"
    volume: str = "cappy-work"
    mount: Annotated[str, Field(pattern=r"^/.*[^/]$")] = "/data"
    pull_secret: str = ""
    service_account: str = ""
    spot: dict[str, str] = Field(default_factory=lambda: {"cloud.google.com/gke-spot": "true"})
    accelerator_labels: dict[str, dict[str, str]] = Field(
        default_factory=lambda: {
            name: {"cloud.google.com/gke-accelerator": label} for name, label in GKE_ACCELERATORS.items()
        }
    )
    runtime: str = "cappy-torch"
    shared_memory: Annotated[Memory, Field(min_length=1)] = "2Gi"


@settings
class Vertex:
    """The project, region and bucket of Vertex AI; the bucket is mounted under /gcs in every step.

    Steps run as `service_account`. `endpoint` replaces Vertex AI's own address.
    """

    project: str = ""
    region: str = "us-central1"
    bucket: Annotated[str, Field(pattern=r"^(gs://[a-z0-9][-_.a-z0-9]+[^/])?$")] = ""
    service_account: str = ""
    network: str = ""
    endpoint: str = ""


def refuse_missing_address(config: Kubeflow | Vertex) -> None:
    """Raises ConfigError if Kubeflow has no endpoint, or Vertex AI has no project or no bucket."""
    if isinstance(config, Kubeflow) and not config.endpoint:
        remedy = "give kubeflow.endpoint in the recipe, or --endpoint https://HOST/pipeline"
        raise ConfigError(f"kubeflow: no endpoint; {remedy}")
    if isinstance(config, Vertex) and not (config.project and config.bucket):
        remedy = "give vertex.project and vertex.bucket (gs://...) in the recipe, or --project and --bucket"
        raise ConfigError(f"vertex: no project or no bucket; {remedy}")


@settings
class Recipe:
    """A run of a pipeline: what to compute (parameters, settings, shards) and where (resources, platforms).

    `parameters` are those of the pipeline's definition, `settings` any other settings by step. `resources` are by step;
    its entry `default` is for steps without one. Change `revision` when content changes that the submitting machine
    cannot see, such as a file on a cluster's volume. `prices` are per hour of one accelerator, or of a step without one
    (`none`); they are used only for the estimate.
    """

    pipeline: Literal["adapt", "pretrain", "evaluate", "batch_score"]
    parameters: dict[str, object] = Field(default_factory=dict)
    settings: Settings = Field(default_factory=dict)
    shards: Annotated[int, Field(strict=True, ge=1, le=MAX_SHARDS)] = 1
    work: str = ""
    tracking_uri: str = ""
    revision: str = ""
    images: dict[Image, str] = Field(default_factory=dict)
    resources: dict[str, Resources] = Field(default_factory=dict)
    prices: dict[Accelerator, Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]] = Field(
        default_factory=dict
    )
    kubeflow: Kubeflow = Field(default_factory=Kubeflow)
    vertex: Vertex = Field(default_factory=Vertex)

    def resources_of(self, step: str) -> Resources:
        """The resources of a step: its own entry, otherwise the default one.

        A default accelerator is for the steps that run a model.
        """
        if step in self.resources:
            return self.resources[step]
        default = self.resources.get("default") or Resources()
        return default if step in ACCELERATED_STEPS else replace(default, accelerator="none", count=1)

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps of the run in order."""
        return PIPELINES[self.pipeline].steps_in(self.shards)


def refuse_password(where: str, address: str) -> None:
    """Raises ConfigError if the address contains a password: the compiled pipeline and every run would store it."""
    if has_secret(address):
        remedy = "give it with the secrets of resources, as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        raise ConfigError(f"{where}: holds a password, which every reader of the run would see; {remedy}")


def read_recipe(path: Path) -> Recipe:
    """Reads a recipe from a YAML file; raises ConfigError with file, key and remedy if it is invalid."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read as a recipe ({error}); give a YAML file such as recipes/adapt.yaml"
        ) from error
    try:
        values = load_yaml(text, _UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {' '.join(str(error).split())}; fix it") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys with values, got {quote(values)}; begin with pipeline: adapt")
    recipe = check_recipe(values, where=str(path))
    for step, settings_of_step in recipe.settings.items():
        if "fresh" in settings_of_step:
            raise ConfigError(f"{path}: settings.{step}.fresh: is only for one run; leave it out and run with --fresh")
    return recipe


class _UniqueKeyLoader(yaml.SafeLoader):
    """A SafeLoader that refuses duplicate keys: YAML forbids them, and PyYAML silently uses the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def check_recipe(values: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """Validates a recipe; raises ConfigError with the invalid key, the reason and the nearest valid key."""
    try:
        recipe = Recipe(**values)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{where}: {_describe_error(error)}") from error
    except TypeError as error:  # A key is not a string.
        raise ConfigError(f"{where}: {error}; keys must be strings") from error
    for kind, names in (("settings", recipe.settings), ("resources", recipe.resources)):
        valid_names = {*recipe.steps, *(("default", TRACKING_TASK) if kind == "resources" else ())}
        for name in names:
            if name not in valid_names:
                problem = f"{recipe.pipeline} has no such step{suggest(name, valid_names)}"
                raise ConfigError(f"{where}: {kind}.{name}: {problem}")
    return recipe


def _describe_error(error: pydantic.ValidationError) -> str:
    # Report an unknown key before a missing one: it is probably the same key, misspelt.
    first = min(error.errors(), key=lambda each: each["type"] != "unexpected_keyword_argument")
    keys = [str(part) for part in first["loc"] if part != "[key]"]
    if first["type"] == "unexpected_keyword_argument":
        return f"{'.'.join(keys)}: no such key{suggest(keys[-1], _valid_keys(keys))}"
    rule = ERROR_TEXTS.get(first["type"]) or first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":  # A check of several keys, whose message names them.
        return f"{'.'.join(keys)}: {rule}"
    value = "" if first["type"].startswith("missing") else f", got {quote(first['input'])}"
    return f"{'.'.join(keys)}: {rule}{value}"


def _valid_keys(keys: list[str]) -> list[str]:
    """The valid keys at the level of the last of `keys`, the path of an invalid key."""
    fields_by_key = {
        "kubeflow": fields(Kubeflow),
        "vertex": fields(Vertex),
        "resources": fields(Resources),
        "tolerations": fields(Toleration),
        "secrets": fields(Secret),
    }
    parents = (key for key in reversed(keys[:-1]) if key in fields_by_key)
    return [field.name for field in next((fields_by_key[key] for key in parents), fields(Recipe))]
