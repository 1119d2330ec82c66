"""Command-line flags derived from a config class (name, type, range, default, description), and shared flags."""

import inspect
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import GenericAlias, MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from cappy.config import ADVANCED, FRESH, flag, nested_settings

SettingFlag = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="STEP.SETTING=VALUE",
        help="Setting of a step, such as finetuning.epochs=2; `cappy STEP --help` lists them (repeatable).",
        show_default="none",
    ),
]
TrackingFlag = Annotated[
    str,
    typer.Option(help="MLflow's address.", show_default="MLFLOW_TRACKING_URI, else the database .cappy/mlflow.db"),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
FreshFlag = Annotated[
    bool, typer.Option("--fresh", help="Redo every step, even if an earlier run with the same settings finished it.")
]
NoChecksFlag = Annotated[
    bool,
    typer.Option(
        "--no-checks",
        help="Start without first checking LLMs, scorers, the source, MLflow and the disk.",
        show_default="off",
    ),
]
EstimateFlag = Annotated[
    bool,
    typer.Option(
        "--estimate",
        help="Print requests, tokens, minutes and cost of the run; send nothing, write nothing.",
        show_default="off",
    ),
]
HELP_ALL = "help_all"
NESTED_SEPARATOR = "__"
"""Replaces the dot of a nested setting in the name of a parameter."""
SCALARS = (bool, int, float, str, Path)
_NAMES_DEFAULT = re.compile(r"\b(default|left out)\b", re.IGNORECASE)


def parameters(config_class: type[Any]) -> list[inspect.Parameter]:
    """One keyword parameter per field of the config class, annotated so that typer creates the flag.

    Fields of a nested config have flags such as --trainjob.image. The flags of ADVANCED fields are hidden;
    `--help-all` shows them; it is hidden itself if there are none.
    """
    fields = list(_fields(config_class))
    flags = [_parameter(path, field, hidden=advanced) for path, field, advanced in fields]
    num_hidden = sum(advanced for _, _, advanced in fields)
    return [*flags, _help_all(num_hidden)]


def _fields(config_class: type[Any]) -> Iterator[tuple[str, FieldInfo, bool]]:
    """Yields path, field and whether it is ADVANCED, for every field including those of nested configs."""
    nested = nested_settings(config_class)
    for name, field in config_class.__pydantic_fields__.items():
        advanced = ADVANCED in field.metadata
        if name not in nested:
            yield name, field, advanced
            continue
        for inner_path, inner_field, inner_advanced in _fields(nested[name]):
            yield f"{name}.{inner_path}", inner_field, advanced or inner_advanced


def make_command(
    name: str,
    text: str,
    function: Callable[..., None],
    flags: Sequence[inspect.Parameter],
    renamed: Mapping[str, str] = MappingProxyType({}),
) -> TyperCommand:
    """Makes a command that calls `function` with the values of these flags by name; `text` is its help.

    `renamed` maps flags of earlier releases to their new names: such a flag is an error that names the new one.
    """

    def verb(**values: Any) -> None:
        values.pop(HELP_ALL, None)
        function(**values)

    signature = inspect.Signature(list(flags))
    verb.__signature__ = signature  # type: ignore[attr-defined]
    verb.__annotations__ = {flag.name: flag.annotation for flag in flags}
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(name, help=text)(verb)
    command = typer.main.get_command(app)
    assert isinstance(command, TyperCommand)  # noqa: S101 (an app with one command is not a group)
    parse = command.parse_args

    def parse_args(context: Any, args: list[str]) -> list[str]:
        for argument in args:
            old = argument.partition("=")[0]
            if old in renamed:
                typer.echo(f"{context.command_path}: {old} is now {renamed[old]}", err=True)
                raise typer.Exit(2)
        return parse(context, args)

    command.parse_args = parse_args  # type: ignore[assignment, method-assign]
    return command


def explicit_values(context: typer.Context, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the flags that the user passed; those of a nested config are a nested object.

    A preset sets only the settings whose flags were not passed.
    """
    sources = {name: context.get_parameter_source(name) for name in values}
    chosen: dict[str, Any] = {}
    for name, value in values.items():
        if (source := sources[name]) and source.name == "DEFAULT":
            continue
        outer, _, inner = name.partition(NESTED_SEPARATOR)
        if inner:
            chosen.setdefault(outer, {})[inner] = value
        else:
            chosen[name] = value
    return chosen


def new_run_name() -> str:
    """A unique name for a run with `--fresh`."""
    return uuid.uuid4().hex


def show_all_flags(command: Any) -> None:
    """Makes the help of a command show its advanced flags."""
    for parameter in command.params:
        parameter.hidden = parameter.name == HELP_ALL


def _help_all(num_hidden: int) -> inspect.Parameter:
    def show(context: typer.Context, requested: bool) -> None:
        if requested:
            show_all_flags(context.command)
            typer.echo(context.get_help())
            raise typer.Exit

    text = f"Show {num_hidden} more flags and exit."
    option = typer.Option(
        "--help-all", help=text, is_eager=True, callback=show, show_default=False, hidden=not num_hidden
    )
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(HELP_ALL, kind, annotation=Annotated[bool, option], default=False)


def flag_type(annotation: Any) -> Any:
    """The type that typer parses: scalars and Literals unchanged, tuples as lists, everything else as text.

    The config class validates the values again, so text works for types that typer does not support.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return flag_type(arguments[0])
    if annotation in SCALARS or origin is Literal:
        return annotation
    if origin in (Union, UnionType):
        others = [argument for argument in arguments if argument is not NoneType]
        inner_type = flag_type(others[0]) if len(others) == 1 else str
        return inner_type | None if NoneType in arguments else inner_type
    if origin in (tuple, list) and arguments:
        item = flag_type(arguments[0])
        return GenericAlias(list, (item if item in SCALARS else str,))
    return str


def _parameter(path: str, field: FieldInfo, *, hidden: bool) -> inspect.Parameter:
    name = path.replace(".", NESTED_SEPARATOR)
    if FRESH in field.metadata:
        option = typer.Option(flag(path), help=field.description)
        annotation = Annotated[bool, option]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=False)
    kind = flag_type(field.annotation)
    default = field.get_default(call_default_factory=True)
    required = field.is_required()
    minimum, maximum = _range(field, kind)
    declaration = f"{flag(path)}/--no-{path.replace('_', '-')}" if kind is bool else flag(path)
    option = typer.Option(
        declaration,
        help=_help(field, kind),
        show_default=_show_default(field) if not required and default in (None, "", ()) else True,
        metavar=f"<{get_args(kind)[0].__name__}>" if get_origin(kind) is list else None,
        min=minimum,
        max=maximum,
        hidden=hidden,
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[kind, option],
        default=inspect.Parameter.empty if required else _format_default(default),
    )


def _show_default(field: FieldInfo) -> str | bool:
    """What help shows as the default of a flag without a value: nothing if the description names the default."""
    return False if _NAMES_DEFAULT.search(field.description or "") else "none"


def _format_default(default: Any) -> Any:
    return list(default) if isinstance(default, tuple) else default


def _help(field: FieldInfo, kind: Any) -> str:
    text = field.description or ""
    for limit in field.metadata:
        for attribute, word in (("gt", "above"), ("lt", "below")):
            if (bound := getattr(limit, attribute, None)) is not None:
                text += f"; must be {word} {bound}"
    return f"{text} (repeatable)" if get_origin(kind) is list else text


def _range(field: FieldInfo, kind: Any) -> tuple[float | None, float | None]:
    """The inclusive bounds, if typer can check them."""
    if get_origin(kind) is list or not {int, float} & {kind, *get_args(kind)}:
        return None, None
    minima = [limit.ge for limit in field.metadata if getattr(limit, "ge", None) is not None]
    maxima = [limit.le for limit in field.metadata if getattr(limit, "le", None) is not None]
    return max(minima, default=None), min(maxima, default=None)
