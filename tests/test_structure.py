"""The shape of the code: few modules, no cycles, layers that hold. Lazy imports and imports by name count too."""

import ast
import re
import statistics
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("cappy", "components", "pipelines", "serving")
MAX_MODULES = 240
LEAST_MEDIAN = 130
MAX_LINES = 400
FOLDERS = (*PACKAGES, "benchmarks", "deploy", "docker", "docs", "requirements", "tests")
BANNED_WORDS = frozenset("told found placed dealt house room dress dressing board shelf purse unwell untold".split())
"""Participles and metaphors that name nothing a reader could guess; CONTRIBUTING.md has the rule."""
MAX_FUNCTION_LINES = 80
MAX_PARAMETERS = 8
MANY_PARAMETERS = 10
"""Functions that may have more parameters than that: commands and components, whose parameters are an interface."""
LAYERS = (
    ("records",),
    ("preparation", "annotation", "sampling"),
    ("selection",),
    ("scoring",),
    ("training", "evaluation"),
    ("registry",),
    ("deployment",),
    ("cli",),
)
"""The packages of the library from the lowest to the highest; a lower one imports no higher one."""


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, of every module."""
    result = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            result[name.removesuffix(".__init__")] = path
    return result


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if not type_checking(child):
            yield child
            yield from statements(child)


def imported(name: str, path: Path) -> Iterator[str]:
    """The modules of ours that a module imports: at its top, in functions, or by a name in a text."""
    for node in statements(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            # `from cappy.cli import steps` needs nothing that the package itself holds.
            yield from names & set(modules()) or {node.module}
            if not names <= set(modules()):
                yield node.module
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "load"):
            yield from (
                word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)
            )


@cache
def graph() -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports, and the packages around those."""
    known = modules()
    result: dict[str, set[str]] = {}
    for name, path in known.items():
        result[name] = {other for other in imported(name, path) if other in known} - {name}
    # The worker reaches every step through the table of steps.
    result["cappy.worker"] |= {
        str(word.value)
        for node in ast.walk(tree(known["cappy.steps"]))
        if isinstance(node, ast.keyword) and node.arg == "module" and isinstance(word := node.value, ast.Constant)
    }
    return result


def cycles() -> list[list[str]]:
    """The sets of modules that reach each other (Tarjan's algorithm)."""
    edges, index, low, stack, result = graph(), {}, {}, [], []  # type: ignore[var-annotated]

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in edges[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = [stack.pop()]
            while group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                result.append(sorted(group))

    for node in edges:
        if node not in index:
            visit(node)
    return result


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in modules().values():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


def level(name: str) -> int | None:
    """The layer of a module of the library; None where it has none."""
    parts = name.split(".")
    if parts[0] != "cappy" or len(parts) < 2:
        return None
    return next((place for place, layer in enumerate(LAYERS) if parts[1] in layer), None)


def test_there_are_few_modules_and_most_have_something_to_say() -> None:
    lines = [len(path.read_text(encoding="utf-8").splitlines()) for path in modules().values()]
    assert len(lines) <= MAX_MODULES
    assert statistics.median(lines) >= LEAST_MEDIAN


def test_no_module_is_too_long_to_read_in_one_go() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items()}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def test_no_module_imports_itself_through_others() -> None:
    assert cycles() == []


def test_a_lower_layer_imports_no_higher_one() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, others in graph().items()
        for other in others
        if (own := level(name)) is not None and (its := level(other)) is not None and its > own
    ]
    assert wrong == []


def test_the_library_imports_nothing_above_it_and_components_only_kfp_and_it() -> None:
    allowed = {"components": {"components", "cappy"}, "serving": {"serving", "cappy"}, "cappy": {"cappy"}}
    wrong = [
        f"{name} imports {other}"
        for name, others in graph().items()
        if (top := name.partition(".")[0]) in allowed and not name.startswith("cappy.cli")
        for other in others
        if other.partition(".")[0] not in allowed[top]
    ]
    assert wrong == []


def test_functions_are_short_and_few_have_many_parameters() -> None:
    result = dict(functions())
    assert [name for name, node in result.items() if (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES] == []
    many = [
        name
        for name, node in result.items()
        if len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs) > MAX_PARAMETERS
    ]
    assert len(many) <= MANY_PARAMETERS, many


def test_a_small_module_has_more_than_one_importer() -> None:
    importers: dict[str, set[str]] = {}
    for name, others in graph().items():
        for other in others:
            importers.setdefault(other, set()).add(name)
    small = {
        name
        for name, path in modules().items()
        if len(path.read_text(encoding="utf-8").splitlines()) < 40 and path.name not in ("__init__.py", "__main__.py")
    }
    assert (
        sorted(name for name in small if len(importers.get(name, ())) == 1 and not name.startswith("components.")) == []
    )


def identifiers(node: ast.AST) -> Iterator[str]:
    """The names that a module gives: of functions, classes, parameters, variables and attributes."""
    for child in ast.walk(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield child.name
        elif isinstance(child, ast.arg):
            yield child.arg
        elif isinstance(child, ast.Name | ast.Attribute) and isinstance(child.ctx, ast.Store):
            yield child.id if isinstance(child, ast.Name) else child.attr


def words(identifier: str) -> set[str]:
    """The words of a name in lower case; "not found", as HTTP says it, is none."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", identifier)]
    return {word for before, word in zip(["", *words], words, strict=False) if (before, word) != ("not", "found")}


def test_no_name_has_a_banned_word() -> None:
    assert words("_FoundRow_told2") == {"found", "row", "told"}
    banned = [
        f"{path.relative_to(ROOT)}: {name}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in [path.stem, *identifiers(tree(path))]
        if words(name) & BANNED_WORDS
    ]
    assert banned == []
