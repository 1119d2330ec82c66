"""Twice what the service can do, with a model swap and SIGTERM in the middle: nothing is lost."""

import asyncio
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from load import Outcome, Pair, capacity, overload
from waiting import wait_until

FAKES = str(Path(__file__).parents[1] / "fakes")
PROGRAM = """
import asyncio
import sys
sys.path.insert(0, sys.argv[1])
from scoring_function import FakeEngine, model
from serving import server
from serving.config import ServeConfig
from serving.following import Follower

def version(name, shift):
    return model(FakeEngine(score=lambda pair: shift + len(pair[1]) / 100, delay=0.02, remembers=False), version=name)

class Restless(Follower):
    async def run(self):
        while True:
            await asyncio.sleep(0.5)
            self.models.swap(version("even", 0.0) if self.models.current.version == "odd" else version("odd", 0.5))

server.serve(
    lambda: version("even", 0.0),
    ServeConfig(port=0, notice=3.0, max_queued_tokens=4000, batch_tokens=400),
    make_follower=lambda models: Restless(models=models, alias="models:/cappy@champion", read_alias=None, load=None),
)
"""
POOLS = [[(f"instruction {number}", "r" * (1 + (number + place) % 30)) for place in range(8)] for number in range(50)]


def expected(version: str, pair: Pair) -> float:
    return (0.5 if version == "odd" else 0.0) + len(pair[1]) / 100


@pytest.fixture
def server(tmp_path: Path) -> Iterator["tuple[subprocess.Popen[bytes], str]"]:
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, FAKES], stderr=file)
    address = wait_until(
        lambda: re.search(r"http://127\.0\.0\.1:\d+", log.read_text()),
        "the address",
        process=process,
        details=log.read_text,
    )
    assert address is not None
    wait_until(lambda: httpx.get(f"{address[0]}/ready").status_code == 200, "a ready service", process=process)
    yield process, address[0]
    process.kill()
    process.wait()


def run(process: "subprocess.Popen[bytes]", address: str, seconds: float, end_after: float | None = None) -> Outcome:
    async def main() -> Outcome:
        rate = 2 * await capacity(address, POOLS, clients=16, seconds=2)
        assert rate > 10
        if end_after is not None:
            asyncio.get_running_loop().call_later(end_after, process.send_signal, signal.SIGTERM)
        ends = end_after is not None
        return await overload(
            address, POOLS, expected, rate=rate, seconds=seconds, process=process.pid, stop_when_unready=ends
        )

    return asyncio.run(main())


def test_twice_the_capacity_is_answered_or_reported_to_wait_while_the_model_changes(
    server: "tuple[subprocess.Popen[bytes], str]",
) -> None:
    process, address = server
    outcome = run(process, address, 18)
    assert outcome.wrong == []
    assert set(outcome.answers) == {"200", "429"}
    assert set(outcome.versions) == {"even", "odd"}
    assert outcome.answers["429"] > 0.05 * outcome.answers.total()
    assert outcome.answers["200"] > 0.05 * outcome.answers.total()
    assert outcome.growth < 0.05
    assert process.poll() is None


def test_sigterm_under_load_loses_nothing_that_was_accepted(server: "tuple[subprocess.Popen[bytes], str]") -> None:
    process, address = server
    outcome = run(process, address, 20, end_after=3)
    assert outcome.wrong == []
    assert set(outcome.answers) <= {"200", "429", "503"}
    assert outcome.answers["200"] > 0
    assert process.wait(20) == 0
