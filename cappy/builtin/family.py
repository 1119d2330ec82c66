"""What a family of procedural tasks is: templates, and a function that draws contents for them."""

import hashlib
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


def content_hash(family: Family, content: Content) -> int:
    """64 bits that depend on the family and the slots, not on the template nor on case or white space.

    Instructions that `prompt_hash` takes for equal have equal slots up to case and white space, so that whatever is
    decided by this hash keeps them together.
    """
    values = (f"{name}={' '.join(content.slots[name].casefold().split())}" for name in sorted(content.slots))
    text = "\n".join((family.name, *values))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
