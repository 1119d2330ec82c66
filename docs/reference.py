"""Generates docs/reference/cli.md and api.md from the command line and the public docstrings.

python docs/reference.py            write both pages
python docs/reference.py --check    write nothing; exit status 1 if a page differs from the code
"""

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from cappy.cli.flags import show_all_flags

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "reference"
PUBLIC = (
    "cappy.records",
    "cappy.preparation",
    "cappy.preparation.templates",
    "cappy.sampling",
    "cappy.annotation",
    "cappy.annotation.report",
    "cappy.scoring",
    "cappy.training.pretraining",
    "cappy.training.finetuning",
    "cappy.evaluation",
    "cappy.registry",
    "cappy.deployment",
    "cappy.errors",
    "serving",
)
"""Packages whose `__all__` is the public API (without `__all__`: all of their public names)."""

CLI_HEAD = """# Command line

Generated from the code by `make reference`. Exit status: 0 success, 1 an error that you can fix (one line on stderr), 2
wrong usage, 130 interrupted by Ctrl-C.
"""
API_HEAD = """# Python

Generated from the code by `make reference`. The names on this page are public; everything else is private to its
package and may change. A step has a config and `run(config, progress)`; the fields of the config are the flags of
[its command](cli.md), where they are explained.
"""

Node = ast.FunctionDef | ast.ClassDef | ast.AnnAssign | ast.Assign


def cli() -> str:
    """The text of cli.md."""
    from cappy.cli import app

    group = typer.main.get_command(app)
    context = _context(group, "cappy", None)
    blocks = [CLI_HEAD]
    for name in group.list_commands(context):  # type: ignore[attr-defined]
        _, command, _ = group.resolve_command(context, [name])  # type: ignore[attr-defined]
        blocks.extend(_verb(command, _context(command, name, context)))
    return "\n".join(blocks)


def _context(command: Any, name: str, parent: Any) -> Any:
    return command.context_class(command, info_name=name, parent=parent)


def _verb(command: Any, context: Any) -> Iterator[str]:
    show_all_flags(command)
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    yield f"## {context.command_path}\n\n`{usage}`\n\n{_paragraphs(command.help)}\n"
    for name, part in getattr(command, "commands", {}).items():
        yield from _verb(part, _context(part, name, context))
    rows = [_flag(*record) for parameter in command.params if (record := parameter.get_help_record(context))]
    if rows and not hasattr(command, "commands"):
        yield "\n".join(rows) + "\n"


def _flag(names: str, text: str) -> str:
    description, _, bracket = " ".join(text.split()).rpartition("[")
    is_range = re.match(r"[^ ]*x[<>]", bracket) is not None
    if not description or not (is_range or bracket.startswith(("default: ", "required"))):
        return f"- `{_type(names)}`: {_escape(' '.join(text.split()))}"
    value = re.sub(r"^\((.*)\)(?=;|$)", r"\1", bracket.removesuffix("]").removeprefix("default: "))
    shown = value if is_range or value.startswith("required") else f"default: {value}"
    return f"- `{_type(names)}` ({_escape(shown)}): {_escape(description.strip())}"


def _type(names: str) -> str:
    return names.replace(" range>", ">")


def _paragraphs(text: str | None) -> str:
    parts = [" ".join(part.split()) for part in inspect.cleandoc(text or "").split("\n\n")]
    return "\n\n".join(map(_escape, parts))


def _escape(text: str) -> str:
    """Text with stars, angle brackets and square brackets escaped, except in code spans."""
    pieces = text.split("`")
    for index in range(0, len(pieces), 2):
        for sign in "*_<[]":
            pieces[index] = pieces[index].replace(sign, "\\" + sign if sign != "<" else "&lt;")
    return "`".join(pieces)


def api() -> str:
    """The text of api.md, read from the sources without importing them, since imports are slow."""
    return "\n".join([API_HEAD, *(_package(name) for name in PUBLIC)])


def _package(name: str) -> str:
    tree = _tree(name)
    summary = _paragraphs((ast.get_docstring(tree) or "").split("\n\n")[0])
    blocks = [f"## {name}\n\n{summary}\n"]
    for public in _public(tree):
        definition = _find(name, public)
        if definition is None:
            raise SystemExit(f"docs/reference.py: {name}.{public} is in __all__ but not defined")
        blocks.append(_entry(public, *definition))
    return "\n".join(blocks)


def _tree(module: str) -> ast.Module:
    return ast.parse(_file(module).read_text(encoding="utf-8"))


def _file(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _public(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    defined = [node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    return [node.name for node in defined if not node.name.startswith("_")]


def _find(module: str, name: str) -> tuple[Node, str] | None:
    """The definition of a name and its docstring, followed through imports within the project."""
    body = _tree(module).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if name == getattr(node, "name", None) and isinstance(node, ast.ClassDef | ast.FunctionDef):
            return node, ast.get_docstring(node) or ""
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if ast.unparse(target) == name:
                return node, _text_of(after)
    imports = [node for node in ast.walk(ast.Module(body, [])) if isinstance(node, ast.ImportFrom)]
    for source, alias in ((node.module or "", alias) for node in imports for alias in node.names):
        if (alias.asname or alias.name) == name and source not in ("", module) and _file(source).is_file():
            return _find(source, alias.name)
    return None


def _text_of(node: ast.stmt | None) -> str:
    value = node.value if isinstance(node, ast.Expr) else None
    return inspect.cleandoc(value.value) if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""


def _entry(name: str, node: Node, doc: str) -> str:
    if isinstance(node, ast.ClassDef):
        return f"### {name}\n\n{_paragraphs(doc)}\n" + "".join(_members(node))
    shown = _signature(name, node) if isinstance(node, ast.FunctionDef) else ast.unparse(node)
    return "\n\n".join(filter(None, (f"### {name}", f"`{shown}`", _paragraphs(doc)))) + "\n"


def _signature(name: str, node: ast.FunctionDef, *, bound: bool = False) -> str:
    arguments = node.args
    if bound and arguments.args:
        arguments.args = arguments.args[1:]
    returned = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{name}({ast.unparse(arguments)}){returned}".replace("'", '"')


def _members(node: ast.ClassDef) -> Iterator[str]:
    decorators = {ast.unparse(decorator).partition("(")[0] for decorator in node.decorator_list}
    fields = [
        field for field in node.body if isinstance(field, ast.AnnAssign) and not ast.unparse(field).startswith("_")
    ]
    if "dataclass" in decorators and fields:
        yield "\n" + "\n".join(f"- `{ast.unparse(field)}`" for field in fields) + "\n"
    for part in node.body:
        if not isinstance(part, ast.FunctionDef) or part.name.startswith("_") or not ast.get_docstring(part):
            continue
        kinds = {ast.unparse(decorator) for decorator in part.decorator_list}
        if "property" in kinds or "cached_property" in kinds:
            shown = f"{part.name}: {ast.unparse(part.returns)}" if part.returns else part.name
        else:
            shown = _signature(part.name, part, bound="staticmethod" not in kinds)
        yield f"\n#### {node.name}.{part.name}\n\n`{shown}`\n\n{_paragraphs(ast.get_docstring(part))}\n"


def main(arguments: list[str]) -> int:
    """Writes or checks the pages; returns the exit status."""
    sys.path.insert(0, str(ROOT))
    stale = []
    for path, text in ((PAGES / "cli.md", cli()), (PAGES / "api.md", api())):
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(path)
            if "--check" not in arguments:
                path.write_text(text, encoding="utf-8")
    message = "differs from the code; run `make reference`" if "--check" in arguments else "written"
    for path in stale:
        sys.stderr.write(f"{path.relative_to(ROOT)}: {message}\n")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
