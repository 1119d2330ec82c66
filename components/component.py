"""The decorator of all components: it sets the image and installs nothing when a step starts."""

from collections.abc import Callable, Mapping
from typing import Protocol

from kfp import dsl

VERSION = "0.1.0"
# The local runner warns about an image whose name does not contain "python".
WORKER = f"cappy-python-worker:{VERSION}"
TRAINER = f"cappy-python-trainer:{VERSION}"
TRAINER_TPU = f"cappy-python-trainer-tpu:{VERSION}"


class Task(Protocol):
    """A kfp task of a pipeline; `outputs` are placeholders by name."""

    @property
    def outputs(self) -> Mapping[str, object]: ...

    def set_caching_options(self, enable_caching: bool) -> object: ...


class Component(Protocol):
    """A kfp component made from `python_func`; calling it in a pipeline's definition adds a task."""

    @property
    def python_func(self) -> Callable[..., object]: ...

    def __call__(self, **arguments: object) -> Task: ...


def component(base_image: str = WORKER) -> Callable[[Callable[..., object]], Component]:
    """Makes a lightweight Python component; its image contains kfp and cappy."""
    decorate: Callable[[Callable[..., object]], Component] = dsl.component(
        base_image=base_image, install_kfp_package=False
    )
    return decorate
