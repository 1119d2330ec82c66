"""When a step that follows a job is itself to end."""

import contextlib
import os
from collections.abc import Callable, Iterator

from cappy.training.ending import Ending
from cappy.worker import ORCHESTRATOR


@contextlib.contextmanager
def cancellation() -> Iterator[Callable[[], str]]:
    """A function that says why this step is to end, "" while it is not: SIGTERM came, or the orchestrator's shell went.

    An orchestrator starts a component under `sh -ec`, and its SIGTERM may end the shell alone: the component then has
    another parent. A command that a person started outlives their shell.
    """
    parent = ORCHESTRATOR.get()
    with Ending() as ending:

        def asked() -> str:
            if ending.asked():
                return "this step got SIGTERM"
            if parent is not None and os.getppid() != parent:
                return "the process that started this step is gone"
            return ""

        yield asked
