"""What a step of a pipeline needs of a cluster, in words that hold on every platform."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cappy.config import settings

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

VERTEX_TYPES: dict[str, str] = {
    "nvidia-t4": "NVIDIA_TESLA_T4",
    "nvidia-l4": "NVIDIA_L4",
    "nvidia-a100-40gb": "NVIDIA_TESLA_A100",
    "nvidia-a100-80gb": "NVIDIA_A100_80GB",
    "nvidia-h100-80gb": "NVIDIA_H100_80GB",
    "nvidia-h200": "NVIDIA_H200_141GB",
}
"""Accelerator -> its name in Vertex AI's AcceleratorType; a TPU is part of a machine's type there and has none."""


def kubernetes_resource(accelerator: str) -> str:
    """The resource that a pod asks for: what the device plugins of NVIDIA and of Google's TPUs advertise."""
    return "google.com/tpu" if accelerator.startswith("tpu-") else "nvidia.com/gpu"


@settings
class Toleration:
    """A taint that the step's pod tolerates, in Kubernetes' words."""

    key: str
    value: str = ""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] = "NoSchedule"


@settings
class Secret:
    """A secret by name: its value reaches the step as an environment variable and stands nowhere else.

    On Kubeflow `name` is a Secret of the namespace and `key` an entry of it. On Vertex AI `name` is a secret of
    Secret Manager, projects/P/secrets/S/versions/V, which the step itself reads with its service account.
    """

    variable: Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")]
    name: Annotated[str, Field(min_length=1)]
    key: str = ""


@settings
class Resources:
    """What one step needs; of a training step that has several nodes, what each node needs.

    `cpu` is in cores, `memory` in Mi or Gi. `hours` ends a step of Kubeflow or Vertex AI that takes longer;
    `retries` are further attempts of the platform, which find the finished parts in the work folder.
    """

    cpu: Annotated[str, Field(pattern=r"^([0-9]+m?)?$")] = ""
    memory: Annotated[str, Field(pattern=r"^([0-9]+(Mi|Gi))?$")] = ""
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
    def _count_of_something(self) -> "Resources":
        if self.count > 1 and self.accelerator == "none":
            raise ValueError(f"count: {self.count} of no accelerator; say which: accelerator: nvidia-l4")
        return self
