"""A row of a source: an instance, where it stands, and what its writer left for us to fill in."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

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
