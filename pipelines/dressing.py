"""What a platform adds to a step's task: resources, secrets, volumes, retries. Without a platform: nothing."""

from collections.abc import Callable
from typing import Any

Dress = Callable[[str, Any], None]
"""Called with a step's name and its kfp task as the pipeline is built."""


def plain(step: str, task: Any) -> None:
    """Leaves the task as it is."""
