"""A function in place of a scorer, behind the service."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi.testclient import TestClient
from waiting import wait_until

from cappy.scoring.encoding import EncodedPair, Pair
from serving.engine import Model

Score = Callable[[Pair], float]


def lengths(pair: Pair) -> float:
    """Tells both members and their order apart."""
    return len(pair[0]) + len(pair[1]) / 1000


@dataclass
class FakeEngine:
    """A token per character and one between; `batches` holds what was computed together, `delay` seconds each.

    One that does not remember finds pairs again by their ids alone, and its memory does not grow.
    """

    score: Score = lengths
    pads: bool = False
    delay: float = 0.0
    remembers: bool = True
    longest: int = 512
    batches: list[list[Pair]] = field(default_factory=list)

    def encode(self, pairs: Sequence[Pair]) -> list[EncodedPair]:
        """Pairs, found again by their ids."""
        result = []
        for instruction, response in pairs:
            result.append(EncodedPair(ids=(*map(ord, instruction), -1, *map(ord, response)), types=()))
        return result

    def fits(self, pairs: Sequence[Pair]) -> bool:
        """Whether no pair has more than `longest` characters."""
        return all(len(instruction) + len(response) <= self.longest for instruction, response in pairs)

    def compute(self, batch: Sequence[EncodedPair]) -> list[tuple[float, float]]:
        """The function, and ten times it for the logit."""
        time.sleep(self.delay)
        pairs = [_texts(pair.ids) for pair in batch]
        if self.remembers:
            self.batches.append(pairs)
        return [(self.score(pair), 10 * self.score(pair)) for pair in pairs]


def _texts(ids: tuple[int, ...]) -> Pair:
    middle = ids.index(-1)
    return "".join(map(chr, ids[:middle])), "".join(map(chr, ids[middle + 1 :]))


def model(engine: FakeEngine | None = None, **facts: Any) -> Model:
    """A model of version abc."""
    return Model(**{"engine": engine or FakeEngine(), "name": "cappy", "version": "abc", "sha256": "f" * 64, **facts})


def until_ready(client: TestClient) -> None:
    """Waits for the probe."""
    wait_until(lambda: client.get("/ready").status_code == 200, "a ready service", seconds=10, pause=0.01)
