"""A row of a source: an instance, where it stands, and what its writer left for us to fill in."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cappy.errors import shown
from cappy.records import Instance

Values = Mapping[str, Any]
Rows = Iterator[tuple[str, Values]]
"""Where each row stands (file:line), and its fields by name."""


@dataclass(frozen=True, slots=True)
class Row:
    """An instance at `where`. Its id and its split are placeholders unless they were given."""

    where: str
    instance: Instance
    has_id: bool = True
    has_split: bool = True


def hash64(text: str) -> int:
    """64 bits of blake2b, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def column_names(names: Iterable[object], limit: int = 120) -> str:
    """Names of columns for a message of so many characters; pandas writes its index without a name."""
    return shown(", ".join(str(name) or "(no name)" for name in names) or "none", limit)
