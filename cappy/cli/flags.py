"""Command line flags derived from a step's config class: name, type, range, default and description."""

import inspect
from pathlib import Path
from types import GenericAlias, NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

SCALARS = (bool, int, float, str, Path)


def parameters(config_class: type[Any]) -> list[inspect.Parameter]:
    """One keyword parameter per field of the config class, annotated so that typer makes the flag."""
    fields: dict[str, FieldInfo] = config_class.__pydantic_fields__
    return [_parameter(name, field) for name, field in fields.items()]


def flag_type(annotation: Any) -> Any:
    """The type that typer parses: scalars and Literals as they are, tuples as lists, everything else as text.

    The config class validates the values again, so text is right for whatever typer does not know.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return flag_type(arguments[0])
    if annotation in SCALARS or origin is Literal:
        return annotation
    if origin in (Union, UnionType):
        others = [argument for argument in arguments if argument is not NoneType]
        known = flag_type(others[0]) if len(others) == 1 else str
        return known | None if NoneType in arguments else known
    if origin in (tuple, list) and arguments:
        item = flag_type(arguments[0])
        return GenericAlias(list, (item if item in SCALARS else str,))
    return str


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    kind = flag_type(field.annotation)
    default = field.get_default(call_default_factory=True)
    required = field.is_required()
    lowest, highest = _range(field, kind)
    option = typer.Option(
        help=_help(field, kind),
        show_default="none" if not required and default in (None, "", ()) else True,
        metavar=f"<{get_args(kind)[0].__name__}>" if get_origin(kind) is list else None,
        min=lowest,
        max=highest,
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[kind, option],
        default=inspect.Parameter.empty if required else _shown(default),
    )


def _shown(default: Any) -> Any:
    return list(default) if isinstance(default, tuple) else default


def _help(field: FieldInfo, kind: Any) -> str:
    parts = [field.description or ""]
    for limit in field.metadata:
        for attribute, word in (("gt", "above"), ("lt", "below")):
            if (bound := getattr(limit, attribute, None)) is not None:
                parts.append(f"({word} {bound})")
    if get_origin(kind) is list:
        parts.append("(repeatable)")
    return " ".join(part for part in parts if part)


def _range(field: FieldInfo, kind: Any) -> tuple[float | None, float | None]:
    """The inclusive bounds, where typer can check them."""
    if get_origin(kind) is list or not {int, float} & {kind, *get_args(kind)}:
        return None, None
    lowest = [limit.ge for limit in field.metadata if getattr(limit, "ge", None) is not None]
    highest = [limit.le for limit in field.metadata if getattr(limit, "le", None) is not None]
    return max(lowest, default=None), min(highest, default=None)
