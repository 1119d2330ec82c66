"""A family of procedural tasks: templates, and a function that draws contents for them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Literal

Kind = Literal["generation", "classification"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """The content of one instance: values for the slots of the templates, and the answer."""

    slots: Mapping[str, str]
    references: tuple[str, ...]
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A kind of task. All templates have the same slots, and the answer depends only on the slots."""

    name: str
    kind: Kind
    templates: tuple[str, ...]
    draw: Callable[[Random], Content]
    held_out: bool = False
