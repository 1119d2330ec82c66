"""From a template and a row to an instruction, a target and choices, in a child process with limits.

What a template may take is in `cappy.rendering`; what it makes of a row is in `cappy.rendering.promptsource`.
"""

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cappy.errors import ConfigError, RecordError, shown
from cappy.preparation.templates.loading import Template
from cappy.rendering import jobs
from cappy.rendering.jobs import MAX_SECONDS, Failure, Job, Source
from cappy.rendering.values import encode

_KIND = "promptsource"
_RESTRICTED = "answer_choices"
_to_json = json.JSONEncoder(ensure_ascii=False).encode


class LimitError(RecordError):
    """A template took too long on a row, or too much memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A row under a template. `choices` is empty for an open-ended template; the target need not be among them."""

    instruction: str
    target: str
    choices: tuple[str, ...] = ()


Result = Rendered | RecordError | None
"""A row under a template; None where T0 drops the row, because its instruction or target is blank."""
Row = Mapping[str, Any]


def render(template: Template, row: Row, *, seed: int = 0, seconds: float = MAX_SECONDS) -> Rendered | None:
    """What the template makes of the row; None where T0 drops the row, because its instruction or target is blank.

    A template that draws at random draws the same for the same row and seed. RecordError if it fails on the row, takes
    longer than `seconds` of CPU time, or does what a template may not; ConfigError if it does not compile. The row is
    left as it is, whatever the template does to it.
    """
    ((result,),) = render_rows([(row, [template])], seed=seed, seconds=seconds)
    if isinstance(result, RecordError):
        raise result
    return result


def render_rows(
    rows: Iterable[tuple[Row, Sequence[Template]]], *, seed: int = 0, seconds: float = MAX_SECONDS
) -> Iterator[list[Result]]:
    """What each template makes of its row, as `render` has it, row by row; rows are read ahead.

    A RecordError stands in place of a result. ConfigError if a template does not compile.
    """
    queue: deque[tuple[Row, Sequence[Template], str]] = deque()
    items_by_id: dict[int, tuple[Template, tuple[Source, str]]] = {}

    def item(template: Template) -> tuple[Source, str]:
        if id(template) not in items_by_id:  # hashing a template takes longer than the rest
            items_by_id[id(template)] = template, (_source(template), f"{seed} {template.id}")
        return items_by_id[id(template)][1]

    def sent() -> Iterator[Job]:
        for row, templates in rows:
            values, problem = _encoded(row)
            queue.append((row, templates, problem))
            items = () if problem else tuple(map(item, templates))
            yield Job(values=values, items=items, seconds=seconds)

    for outcomes in jobs.run(_KIND, sent()):
        row, templates, problem = queue.popleft()
        if problem:
            yield [RecordError(f"{_where(template)}: {problem}") for template in templates]
        else:
            yield [_result(template, row, outcome) for template, outcome in zip(templates, outcomes, strict=True)]


def fixed_choices(template: Template) -> tuple[str, ...] | None:
    """The choices that are the same for every row; None if they depend on it, or there are none."""
    fields(template)
    ((outcome,),) = jobs.run(_KIND, [Job(items=((_source(template), None),))])
    if isinstance(outcome, Failure):
        raise _config_error(template, outcome)
    return None if outcome is None else tuple(_texts(template, outcome))


def fields(template: Template) -> frozenset[str]:
    """The fields of a row that the template reads; ConfigError if it does not compile.

    PromptSource takes a field that a row lacks for an empty text, silently: a caller that wants to know must ask.
    """
    outcome = jobs.load(_source(template))
    if isinstance(outcome, Failure):
        raise _config_error(template, outcome)
    return frozenset(_texts(template, outcome))


def _source(template: Template) -> Source:
    return Source(_KIND, (template.jinja, template.answer_choices))


def _encoded(row: Row) -> tuple[str, str]:
    """The row as a job has it, and what is wrong with it."""
    if any(name.replace("-", "_") == _RESTRICTED for name in row):
        return "{}", f"the row has a field {_RESTRICTED}, which is the template's; rename the column"
    try:
        return _to_json(encode(row)), ""
    except RecursionError:
        return "{}", "the row's values are nested too deep; mend the row"


def _result(template: Template, row: Row, outcome: Any) -> Result:
    if outcome is None:
        return None
    if not isinstance(outcome, Failure):
        if not isinstance(outcome, list) or len(outcome) != 3:
            raise TypeError(f"{_where(template)}: the child answers {shown(outcome)}")
        instruction, target = _texts(template, outcome[:2])
        return Rendered(instruction=instruction, target=target, choices=tuple(_texts(template, outcome[2])))
    if outcome.loading:
        raise _config_error(template, outcome)
    names = shown(", ".join(map(str, row)) or "none", limit=120)
    remedy = f"fields of the row: {names}; mend the row or leave the template out"
    error = LimitError if outcome.limited else RecordError
    return error(f"{_where(template)} fails on the row ({outcome.reason}); {remedy}")


def _texts(template: Template, found: Any) -> list[str]:
    """The texts of an answer; what comes from a child is not trusted."""
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise TypeError(f"{_where(template)}: the child answers {shown(found)}")
    return found


def _config_error(template: Template, failure: Failure) -> ConfigError:
    return ConfigError(f"{_where(template)} does not compile ({failure.reason}); mend or leave it out")


def _where(template: Template) -> str:
    return f"{template.dataset}: template {shown(template.name)}"
