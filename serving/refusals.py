"""Requests that are refused: the refusal itself, and what is wrong with a body, said in the words of its sender."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

SHUTTING_DOWN = "the service was told to end"
"""Why a service is not ready that still answers."""

RULES = {
    "missing": "is missing",
    "extra_forbidden": "cannot be honoured here; leave it out",
    "string_type": "must be a text",
    "string_too_short": "may not be empty",
    "string_too_long": "may have at most {max_length} characters",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "too_short": "must have {min_length} or more items",
    "too_long": "may have at most {max_length} items",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
}
"""pydantic's kind of error -> what the field must be."""

SHOWN = 60
"""Characters that are repeated of a name which a client chose."""


class Refusal(Exception):  # noqa: N818 (not an error of ours)
    """Status 4xx or 5xx with what was wrong and what to do, in one line; `retry_after` in whole seconds."""

    def __init__(self, status: int, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after = retry_after


@dataclass(frozen=True, kw_only=True)
class Broken:
    """The first rule that a body breaks: where (`pairs.0.1`, empty for the body itself), which, and how many more."""

    field: str
    rule: str
    more: int

    def __str__(self) -> str:
        return f"{self.field or 'body'}: {self.rule}" + (f" (and {self.more} more)" if self.more else "")


def broken(error: ValidationError, body: object) -> Broken:
    """What is wrong with `body`, none of whose texts are repeated."""
    errors = error.errors(include_url=False, include_input=False)
    # Where a field may have several forms, a sentence of ours says more than that it has not the first form.
    first = next((one for one in errors if one["type"] == "value_error"), errors[0])
    form = RULES.get(first["type"])
    rule = form.format(**first.get("ctx", {})) if form else first["msg"].removeprefix("Value error, ")
    fields = {_field(one["loc"], body, one["type"]) for one in errors}
    return Broken(field=_field(first["loc"], body, first["type"]), rule=rule, more=len(fields) - 1)


def _field(location: Sequence[int | str], body: object, kind: str) -> str:
    """A location without the names of the forms that a field may have, which pydantic puts between its steps."""
    kept, value = [], body
    for place, step in enumerate(location):
        if isinstance(step, int):
            value = value[step] if isinstance(value, list) and step < len(value) else None
        elif isinstance(value, Mapping) and (step in value or (kind == "missing" and place == len(location) - 1)):
            value = value.get(step)
        else:
            continue
        kept.append(str(step)[:SHOWN])
    return ".".join(kept)
