"""The one spelling of a component: which image runs it, and that nothing is installed when it starts."""

from collections.abc import Callable
from typing import Any

from kfp import dsl

VERSION = "0.1.0"
# The local runner warns of an image whose name does not contain "python".
WORKER = f"cappy-python-worker:{VERSION}"
TRAINER = f"cappy-python-trainer:{VERSION}"
TRAINER_TPU = f"cappy-python-trainer-tpu:{VERSION}"


def component(base_image: str = WORKER) -> Callable[[Callable[..., Any]], Any]:
    """Makes a light Python component whose image already holds kfp and cappy."""
    decorate: Callable[[Callable[..., Any]], Any] = dsl.component(base_image=base_image, install_kfp_package=False)
    return decorate
