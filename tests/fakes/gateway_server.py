"""The gateway on a free port of this machine, in a thread, while a test needs it."""

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
from waiting import wait_until

from cappy.scoring.calibration import Calibration
from serving.gateway.answering import Gateway
from serving.gateway.app import create_app
from serving.gateway.config import Policy
from serving.gateway.policy import Prices
from serving.gateway.scoring import Evaluated, Scoring
from serving.gateway.upstream import LLM, Upstream

PRICES = Prices(input=100.0, output=1000.0)
"""A call of the fake server with one choice (10 and 5 tokens) costs 0.006."""


def by_number(response: str) -> float:
    """A score that the fake server's answers bring with them: `WORDS seed/number`, seed counted tenfold."""
    seed, _, number = response.rpartition(" ")[2].partition("/")
    return (10 * int(seed if seed.isdigit() else 0) + int(number)) / 100


def scoring(score: Any = by_number, calibration: Calibration | None = None) -> Scoring:
    """A scorer of responses, by a function of one."""

    async def scores(pairs: Sequence[tuple[str, str]]) -> list[float]:
        return [score(response) for _, response in pairs]

    return Scoring(score=scores, version=lambda: "0123456789ab", evaluated=lambda: Evaluated(calibration=calibration))


def sampled(**settings: Any) -> Policy:
    """A policy whose candidates are all sampled, so that the fake server counts them in order."""
    return Policy(greedy=False, **settings)


def gateway(url: str, *, key: str = "", **settings: Any) -> Gateway:
    """A gateway in front of the LLM at this address; by default its candidates are all sampled."""
    upstream = Upstream(LLM(url=url, key=key, prices=PRICES))
    return Gateway(**{"upstream": upstream, "scoring": scoring(), "policy": sampled(), **settings})


@contextmanager
def listening(gateway: Gateway, **settings: Any) -> Iterator[str]:
    """The base URL of the gateway."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(create_app(gateway, **settings), log_config=None, log_level="warning", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        wait_until(lambda: server.started, "the gateway to listen", seconds=20, pause=0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join(20)
