"""A share of the work, for several machines: shard i of N does its rows and no other does."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from cappy.errors import ConfigError, shown

MAX_SHARDS = 4_096
ShardOf = Annotated[
    str, Field(description="Share of the work, i/N, counted from 0: 0/4 to 3/4 on four machines; all if left out")
]


@dataclass(frozen=True, slots=True)
class Shard:
    """Shard `index` of `count`, counted from 0."""

    index: int = 0
    count: int = 1

    def rows(self, total: int) -> range:
        """Its rows of `total`: contiguous, and of all shards together each row once."""
        return range(total * self.index // self.count, total * (self.index + 1) // self.count)

    def holds(self, row: int) -> bool:
        """Whether it has this row of a source whose length nobody knows: rows are dealt in turn."""
        return row % self.count == self.index


def refuse_same(source: str | Path, target: Path) -> None:
    """ConfigError where the target is the source: what was there would be gone."""
    if Path(source).resolve() == target.resolve():
        raise ConfigError(f"--target: {target} is the source itself; choose another folder")


def parse_shard(text: str) -> Shard:
    """The shard that i/N names, the whole for an empty text; ConfigError for another form."""
    if not text:
        return Shard()
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", text.strip())
    if found is None or not int(found[1]) < int(found[2]) <= MAX_SHARDS:
        last = f"counted from 0, of at most {MAX_SHARDS:,}"
        raise ConfigError(f"--shard: {shown(text)} is no shard i/N; give 0/4 to 3/4 for four, {last}")
    return Shard(int(found[1]), int(found[2]))
