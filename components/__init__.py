"""One module per step: a typed Kubeflow component whose body is one call into cappy.

These modules import only kfp and the standard library; the function bodies import cappy when a step runs. So a pipeline
can be compiled without the packages that the steps need.

The decorator here, for all components, sets the image and disables installing packages when a step starts.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

from kfp import dsl

VERSION = "0.1.0"
# The local runner warns about an image whose name does not contain "python".
WORKER_IMAGE = f"cappy-python-worker:{VERSION}"
TRAINER_IMAGE = f"cappy-python-trainer:{VERSION}"
# With CUDA's build of torch, for steps that have a GPU.
WORKER_CUDA_IMAGE = f"cappy-python-worker-cuda:{VERSION}"
TRAINER_CUDA_IMAGE = f"cappy-python-trainer-cuda:{VERSION}"
TRAINER_TPU_IMAGE = f"cappy-python-trainer-tpu:{VERSION}"


class Task(Protocol):
    """A kfp task of a pipeline; `outputs` maps output names to placeholders."""

    @property
    def outputs(self) -> Mapping[str, object]: ...

    def set_caching_options(self, enable_caching: bool) -> object: ...


class Component(Protocol):
    """A kfp component made from `python_func`; calling it in a pipeline function adds a task."""

    @property
    def python_func(self) -> Callable[..., object]: ...

    def __call__(self, **arguments: object) -> Task: ...


def component(base_image: str = WORKER_IMAGE) -> Callable[[Callable[..., object]], Component]:
    """Returns a decorator that makes a lightweight Python component; `base_image` must contain kfp and cappy."""
    decorate: Callable[[Callable[..., object]], Component] = dsl.component(
        base_image=base_image, install_kfp_package=False
    )
    return decorate
