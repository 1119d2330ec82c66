"""Who may import whom: the library knows no platform, components reach it only when they run."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import cappy

ROOT = Path(cappy.__file__).parents[1]
CAPPY_SEES_NEVER = {"kfp", "components", "pipelines", "serving"}
VERBS_MAY = {"pipelines", "serving"}


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path, *, top_only: bool = False) -> Iterator[str]:
    """First names of the modules that a file imports, anywhere or outside functions."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)) or _for_types_alone(function)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if top_only and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").partition(".")[0]


def _for_types_alone(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@pytest.mark.parametrize("path", files("cappy"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_knows_no_platform(path: Path) -> None:
    command_line = (ROOT / "cappy" / "cli") in path.parents
    forbidden = CAPPY_SEES_NEVER - (VERBS_MAY if command_line else set())
    assert not forbidden & set(imported(path))
    assert not CAPPY_SEES_NEVER & set(imported(path, top_only=True))


@pytest.mark.parametrize("path", files("components"), ids=lambda path: path.stem)
def test_components_reach_the_library_inside_their_bodies_alone(path: Path) -> None:
    assert not {"cappy", "pipelines", "serving"} & set(imported(path, top_only=True))
    assert not {"pipelines", "serving"} & set(imported(path))


@pytest.mark.parametrize("path", files("serving"), ids=lambda path: path.stem)
def test_the_service_knows_no_pipeline(path: Path) -> None:
    assert not {"pipelines", "components", "kfp"} & set(imported(path))


@pytest.mark.parametrize("path", files("pipelines"), ids=lambda path: path.stem)
def test_pipelines_know_nothing_heavy(path: Path) -> None:
    heavy = {"torch", "transformers", "mlflow", "serving", "deepspeed", "google"}
    assert not heavy & set(imported(path, top_only=path.parent.name == "clients"))
