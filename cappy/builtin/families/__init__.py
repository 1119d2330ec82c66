"""What a family of procedural tasks is: templates, and a function that draws contents for them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Literal

Kind = Literal["generation", "classification"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What one instance asks for, before a template words it: the slots of the template, and the answer."""

    slots: Mapping[str, str]
    references: tuple[str, ...]
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A kind of task. Every template names the same slots, and an answer follows from the slots alone."""

    name: str
    kind: Kind
    templates: tuple[str, ...]
    draw: Callable[[Random], Content]
    held_out: bool = False
