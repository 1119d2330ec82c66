"""More requests than a service can answer, sent at a steady rate whatever comes back, and what came of each."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

Pair = tuple[str, str]
Expected = Callable[[str, Pair], float]
"""The score that a version gives a pair."""


@dataclass
class Outcome:
    """Counts of answers by status (or by the error of a connection), and what was wrong with any."""

    answers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    versions: Counter[str] = field(default_factory=Counter)
    memory: list[int] = field(default_factory=list)
    """Resident bytes of the server, once a second."""

    @property
    def growth(self) -> float:
        """Share by which the last quarter's median is above the second quarter's: memory after warming up."""
        quarter = len(self.memory) // 4
        early, late = (
            sorted(part)[len(part) // 2] for part in (self.memory[quarter : 2 * quarter], self.memory[-quarter:])
        )
        return late / early - 1


async def capacity(address: str, pools: Sequence[Sequence[Pair]], *, clients: int, seconds: float) -> float:
    """Requests a second that clients get answered who each wait for their last one."""
    done = 0
    async with httpx.AsyncClient(timeout=60) as client:

        async def work(number: int) -> None:
            nonlocal done
            for turn in range(10**9):
                pool = pools[(number + turn * clients) % len(pools)]
                answer = await client.post(f"{address}/score", json={"pairs": pool})
                done += answer.status_code == 200

        tasks = [asyncio.create_task(work(number)) for number in range(clients)]
        await asyncio.sleep(seconds)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return done / seconds


async def overload(
    address: str,
    pools: Sequence[Sequence[Pair]],
    expected: Expected,
    *,
    rate: float,
    seconds: float,
    process: int,
    stop_when_unready: bool = False,
) -> Outcome:
    """`rate` requests a second for so long, then waits for the last answer.

    With `stop_when_unready` no more are sent once /ready is no longer 200, as a balancer would have it.
    """
    outcome, rng = Outcome(), random.Random(0)
    ended = asyncio.Event()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(timeout=120, limits=limits) as client:
        watching = asyncio.create_task(_watch(client, address, process, outcome, ended if stop_when_unready else None))
        tasks = []
        loop = asyncio.get_running_loop()
        start = loop.time()
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, start + number / rate - loop.time()))
            if ended.is_set():
                break
            pool = pools[rng.randrange(len(pools))]
            tasks.append(asyncio.create_task(_ask(client, address, pool, expected, outcome)))
        await asyncio.gather(*tasks)
        watching.cancel()
    return outcome


async def _ask(
    client: httpx.AsyncClient, address: str, pool: Sequence[Pair], expected: Expected, outcome: Outcome
) -> None:
    try:
        answer = await client.post(f"{address}/score", json={"pairs": pool})
    except httpx.HTTPError as error:
        outcome.answers[type(error).__name__] += 1
        return
    outcome.answers[str(answer.status_code)] += 1
    if answer.status_code == 200:
        _check(answer.json(), answer.headers, pool, expected, outcome)
    elif "scores" in answer.text or (answer.status_code == 429 and "retry-after" not in answer.headers):
        outcome.wrong.append(answer.text)


def _check(
    result: Mapping[str, object], headers: httpx.Headers, pool: Sequence[Pair], expected: Expected, outcome: Outcome
) -> None:
    version = str(result["version"])
    outcome.versions[version] += 1
    scores = result["scores"]
    right = [expected(version, pair) for pair in pool]
    if headers["x-cappy-version"] != version or not isinstance(scores, list):
        outcome.wrong.append(f"{version} says {headers['x-cappy-version']}")
    elif max(abs(one - other) for one, other in zip(scores, right, strict=True)) > 5e-3:
        outcome.wrong.append(f"{version} gave {scores}, not {right}")


async def _watch(
    client: httpx.AsyncClient, address: str, process: int, outcome: Outcome, ended: asyncio.Event | None
) -> None:
    while True:
        status = Path(f"/proc/{process}/statm")
        if status.exists():
            outcome.memory.append(int(status.read_text().split()[1]) * 4096)
        if ended is not None:
            try:
                ready = (await client.get(f"{address}/ready", timeout=5)).status_code == 200
            except httpx.HTTPError:
                ready = False
            if not ready:
                ended.set()
        await asyncio.sleep(0.25 if ended is not None else 1)
