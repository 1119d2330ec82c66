"""From a template and a row to an instruction, a target and choices: PromptSource's `Template.apply`, and T0's rules.

PromptSource v0.1.0 (commit 4a662713, the one T0 was trained with) and T0's `apply_template` are the measure, their
oddities included; each stands where it is reproduced.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jinja2
from jinja2 import meta

from cappy.errors import ConfigError, RecordError, shown
from cappy.preparation.templates.bounds import Budget, spending
from cappy.preparation.templates.loading import Template
from cappy.preparation.templates.sandbox import ENVIRONMENT

MAX_SECONDS = 2.0
_SEPARATOR = "|||"
# Stands for the separator inside values. PromptSource's own: its multi_news templates split their documents at it.
_PROTECTOR = "3ed2dface8203c4c9dfb1a5dc58e41e0"
_RESTRICTED = "answer_choices"
_CACHED = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A row under a template. `choices` is empty for an open-ended template; the target need not be among them."""

    instruction: str
    target: str
    choices: tuple[str, ...] = ()


def render(
    template: Template, row: Mapping[str, Any], *, seed: int = 0, seconds: float = MAX_SECONDS
) -> Rendered | None:
    """What the template makes of the row; None where T0 drops the row, because its instruction or target is blank.

    A template that draws at random draws the same for the same row and seed. RecordError if it fails on the row, takes
    longer than `seconds`, or does what a template may not; ConfigError if it does not compile. The row is left as it
    is, whatever the template does to it.
    """
    values = _values(template, row)
    budget = Budget(seconds, lambda: f"{seed} {template.id} {sorted(values.items(), key=lambda item: item[0])!r}")
    with spending(budget):
        code = _compiled(template)
        try:
            return _rendered(code, values)
        except Exception as error:  # foreign code: whatever it raises is its own failure
            raise RecordError(f"{_where(template)} fails on the row ({_reason(error)}); {_remedy(row)}") from error


def fixed_choices(template: Template) -> tuple[str, ...] | None:
    """The choices that are the same for every row; None if they depend on it, or there are none."""
    if not template.answer_choices or _names(template, template.answer_choices):
        return None
    with spending(Budget(MAX_SECONDS, lambda: template.id)):
        text = _compile(template, template.answer_choices).render()
    return tuple(choice.strip() for choice in text.split(_SEPARATOR))


def fields(template: Template) -> frozenset[str]:
    """The fields of a row that the template reads.

    PromptSource takes a field that a row lacks for an empty text, silently: a caller that wants to know must ask.
    """
    names = _names(template, template.jinja) | _names(template, template.answer_choices)
    return frozenset(names - {_RESTRICTED})


class _Code(NamedTuple):
    text: jinja2.Template
    choices: jinja2.Template | None


def _rendered(code: _Code, values: dict[str, Any]) -> Rendered | None:
    choices: list[str] | None = None
    if code.choices is not None:
        choices = [_restored(choice.strip()) for choice in code.choices.render(values).split(_SEPARATOR)]
    # A choice that holds the separator is not protected here, so it makes a part more, and the row is dropped.
    text = code.text.render({**values, _RESTRICTED: choices})
    parts = [_restored(part).strip() for part in text.split(_SEPARATOR)]
    # T0 drops a row of one part (the template printed nothing) and of three (it was split wrong). From late September
    # 2021 on it kept a blank target as "<NO LABEL>", for test splits; no response is right there, so it is dropped.
    if len(parts) != 2 or not all(parts):
        return None
    return Rendered(instruction=parts[0], target=parts[1], choices=tuple(choices or ()))


def _values(template: Template, row: Mapping[str, Any]) -> dict[str, Any]:
    """The row as templates see it: hyphens in names are underscores, and top texts, no inner ones, are protected."""
    values = {name.replace("-", "_"): _copied(value) for name, value in row.items()}
    if _RESTRICTED in values:
        remedy = "rename the column"
        raise RecordError(f"{_where(template)}: the row has a field {_RESTRICTED}, which is the template's; {remedy}")
    return {
        name: value.replace(_SEPARATOR, _PROTECTOR) if isinstance(value, str) else value
        for name, value in values.items()
    }


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _copied(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_copied(inner) for inner in value]
    return value


def _restored(text: str) -> str:
    return text.replace(_PROTECTOR, _SEPARATOR)


@lru_cache(maxsize=_CACHED)
def _compiled(template: Template) -> _Code:
    # Every "}}" is taken for the end of an output, and the filters bind to its last operand alone: {{ a + b }} cuts b.
    cut = template.jinja.replace("}}", " | string | truncate(2048) }}")
    choices = _compile(template, template.answer_choices) if template.answer_choices else None
    return _Code(_compile(template, cut), choices)


def _compile(template: Template, source: str) -> jinja2.Template:
    try:
        return ENVIRONMENT.from_string(source)
    except Exception as error:
        raise ConfigError(f"{_where(template)} does not compile ({_reason(error)}); mend or leave it out") from error


def _names(template: Template, source: str) -> set[str]:
    try:
        return meta.find_undeclared_variables(ENVIRONMENT.parse(source))
    except Exception as error:
        raise ConfigError(f"{_where(template)} does not compile ({_reason(error)}); mend or leave it out") from error


def _where(template: Template) -> str:
    return f"{template.dataset}: template {shown(template.name)}"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {shown(' '.join(str(error).split()), limit=120)}"


def _remedy(row: Mapping[str, Any]) -> str:
    names = shown(", ".join(map(str, row)) or "none", limit=120)
    return f"fields of the row: {names}; mend the row or leave the template out"
