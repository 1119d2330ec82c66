"""A function in place of a scorer, behind the service."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi.testclient import TestClient

from cappy.scoring.encoding import Encoded, Pair
from serving.models import Model

Score = Callable[[Pair], float]


def lengths(pair: Pair) -> float:
    """Tells both members and their order apart."""
    return len(pair[0]) + len(pair[1]) / 1000


@dataclass
class FakeEngine:
    """A token per character and one at the end; `batches` holds what was computed together, `delay` seconds each."""

    score: Score = lengths
    pads: bool = False
    delay: float = 0.0
    batches: list[list[Pair]] = field(default_factory=list)
    _texts: dict[tuple[int, ...], Pair] = field(default_factory=dict)

    def encode(self, pairs: Sequence[Pair]) -> list[Encoded]:
        """Pairs, found again by their ids."""
        found = []
        for instruction, response in pairs:
            ids = (*map(ord, instruction), 0, *map(ord, response))
            self._texts[ids] = (instruction, response)
            found.append(Encoded(ids=ids, types=()))
        return found

    def compute(self, batch: Sequence[Encoded]) -> list[tuple[float, float]]:
        """The function, and ten times it for the logit."""
        time.sleep(self.delay)
        pairs = [self._texts[pair.ids] for pair in batch]
        self.batches.append(pairs)
        return [(self.score(pair), 10 * self.score(pair)) for pair in pairs]


def model(engine: FakeEngine | None = None, **facts: Any) -> Model:
    """A model of version abc."""
    return Model(**{"engine": engine or FakeEngine(), "name": "cappy", "version": "abc", "sha256": "f" * 64, **facts})


def until_ready(client: TestClient) -> None:
    """Waits for the probe."""
    deadline = time.monotonic() + 10
    while client.get("/ready").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.01)
