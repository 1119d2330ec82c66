"""A service that is ready, with a function in place of a scorer."""

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from fastapi.testclient import TestClient
from scoring_function import FakeEngine, model, until_ready

from serving.app import Options, create_app
from serving.engine import Models


@pytest.fixture(scope="module", autouse=True)
def small_heap() -> None:
    """Takes what is loaded out of the garbage collector: every service collects once at its start, here hundreds do."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def serve() -> Iterator[Callable[..., TestClient]]:
    """serve(engine, options, **facts of the model) -> a client of a service that is ready."""
    with ExitStack() as stack:

        def start(engine: FakeEngine | None = None, options: Options | None = None, **facts: Any) -> TestClient:
            client = stack.enter_context(TestClient(create_app(Models(model(engine, **facts)), options)))
            until_ready(client)
            return client

        yield start
