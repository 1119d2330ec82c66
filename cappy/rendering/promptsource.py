"""A PromptSource template in the child: `Template.apply` of PromptSource, and T0's rules.

PromptSource v0.1.0 (commit 4a662713, the one T0 was trained with) and T0's `apply_template` are the measure, their
oddities included; each stands where it is reproduced.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jinja2
from jinja2 import meta

from cappy.rendering.filters import seed_draws
from cappy.rendering.sandbox import ENVIRONMENT

RESTRICTED = "answer_choices"
_SEPARATOR = "|||"
# Stands for the separator inside values. PromptSource's own: its multi_news templates split their documents at it.
_PROTECTOR = "3ed2dface8203c4c9dfb1a5dc58e41e0"


class Code(NamedTuple):
    """A compiled template; `fixed` says that its choices read no field of a row."""

    text: jinja2.Template
    choices: jinja2.Template | None
    fixed: bool


class Values(NamedTuple):
    """A row as templates see it: what cannot be changed, and the lists and mappings, of which each gets a copy."""

    plain: dict[str, Any]
    containers: dict[str, Any]

    def copy(self) -> dict[str, Any]:
        """The row for one template, in its own order."""
        if not self.containers:
            return self.plain.copy()
        copies = {name: _copied(value) for name, value in self.containers.items()}
        return {**self.plain, **copies}


def load(jinja: str, answer_choices: str) -> tuple[Code, list[str]]:
    """The compiled template, and the fields of a row that it reads, sorted."""
    # Every "}}" is taken for the end of an output, and the filters bind to its last operand alone: {{ a + b }} cuts b.
    text = _compiled(jinja.replace("}}", " | string | truncate(2048) }}"))
    choices = _compiled(answer_choices) if answer_choices else None
    of_choices = _names(answer_choices)
    return Code(text, choices, not of_choices), sorted((_names(jinja) | of_choices) - {RESTRICTED})


def prepare(row: Mapping[str, Any]) -> Values:
    """The row with underscores for hyphens in names, and top texts, no inner ones, protected."""
    named = {name.replace("-", "_"): value for name, value in row.items()}
    plain = {
        name: value.replace(_SEPARATOR, _PROTECTOR) if isinstance(value, str) else value
        for name, value in named.items()
    }
    return Values(plain, {name: value for name, value in named.items() if isinstance(value, list | dict | tuple)})


def render(code: Code, values: Values, seed: str | None) -> list[Any] | None:
    """Instruction, target and choices, or None where T0 drops the row; without a seed the choices, if they are fixed.

    `seed` and the row seed what the template draws.
    """
    if seed is None:
        return _choices(code.choices, {}) if code.choices and code.fixed else None
    own = values.copy()
    seed_draws(lambda: f"{seed} {sorted(own.items(), key=_name)!r}")
    choices = _choices(code.choices, own) if code.choices else None
    # A choice that holds the separator is not protected here, so it makes a part more, and the row is dropped.
    parts = [_restored(part).strip() for part in code.text.render(own, **{RESTRICTED: choices}).split(_SEPARATOR)]
    # T0 drops a row of one part (the template printed nothing) and of three (it was split wrong). From late September
    # 2021 on it kept a blank target as "<NO LABEL>", for test splits; no response is right there, so it is dropped.
    if len(parts) != 2 or not all(parts):
        return None
    return [*parts, choices or []]


def _compiled(source: str) -> jinja2.Template:
    template = ENVIRONMENT.from_string(source)
    template.globals = dict(template.globals)  # a ChainMap, which is copied at each render, is a third of its time
    return template


def _choices(template: jinja2.Template, values: Mapping[str, Any]) -> list[str]:
    return [_restored(choice.strip()) for choice in template.render(values).split(_SEPARATOR)]


def _restored(text: str) -> str:
    return text.replace(_PROTECTOR, _SEPARATOR)


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copied(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_copied(inner) for inner in value]
    if isinstance(value, tuple):
        return tuple(map(_copied, value))
    return value


def _names(source: str) -> set[str]:
    return meta.find_undeclared_variables(ENVIRONMENT.parse(source)) if source else set()


def _name(item: tuple[str, Any]) -> str:
    return item[0]
