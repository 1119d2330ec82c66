"""A YAML file of others unfolds to no more than its bounds, wherever one is read."""

import resource
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from wording import raises_naming

from cappy.errors import ConfigError
from cappy.preparation.templates import load_templates
from cappy.sampling.strategies import read_decodings
from cappy.untrusted import load_all_yaml, load_yaml
from pipelines.builder import load_package
from pipelines.recipe import check_recipe, read_recipe

PRIME = 2**61 - 1


def unfolding(first: str, line: str) -> str:
    """Each line holds the one before nine times."""
    return first + "".join(
        f"a{number}: &a{number} {line.replace('ONE', f'*a{number - 1}')}\n" for number in range(1, 30)
    )


BOMBS = {
    "aliases of aliases": unfolding("a0: &a0 [x, x]\n", f"[{', '.join(['ONE'] * 9)}]"),
    "mappings of mappings": unfolding("a0: &a0 {k: v}\n", f"{{{', '.join(f'k{i}: ONE' for i in range(9))}}}"),
    "merged mappings": unfolding("a0: &a0 {k: v, l: w}\n", f"{{<<: [{', '.join(['ONE'] * 9)}]}}"),
    "a long list, often": f"a: &a [{'x, ' * 50_000}]\nb: [{'*a, ' * 50_000}]\n",
    "a list of itself": "a: &a [*a]\n",
    "brackets": "a: " + "[" * 400_000 + "\n",
    "braces": "a: " + "{a: " * 200_000 + "\n",
    "indents": "".join(" " * n + "a:\n" for n in range(900)),
    "keys with one hash": "a: {" + ", ".join(f"{PRIME * n}: 1" for n in range(1, 35_000)) + "}\n",
    "a number of many parts": "a: 1" + ":1" * 400_000 + "\n",
    "a number with many digits": "a: !!float " + "1" * 900_000 + "\n",
    "a large file": "# " + "x" * 2**24 + "\n",
    "many values": "a: [" + "x, " * 300_000 + "]\n",
}


def templates(path: Path) -> object:
    return load_templates(path.parents[1], path.parent.name)


def package(path: Path) -> object:
    return load_package(check_recipe({"pipeline": "adapt"}), "vertex", {}, path)


READERS: dict[str, Callable[[Path], object]] = {
    "templates": templates,
    "decodings": read_decodings,
    "recipe": read_recipe,
    "compiled pipeline": package,
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_file_that_unfolds_is_refused_in_one_line_before_it_does(
    reader: Callable[[Path], object], text: str, tmp_path: Path
) -> None:
    path = tmp_path / "templates.yaml"
    path.write_text(text)
    start, before = time.monotonic(), peak_bytes()
    with pytest.raises(ConfigError, match=rf"{path}.*(\d (deep|values|keys|characters|bytes)\b|alias 'a')") as caught:
        reader(path)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 100
    assert peak_bytes() - before < 100 * 2**20


@pytest.mark.parametrize(
    "value", ["2001-99-99", "!!timestamp x", "!!bool x", "!!int ''", "!!int x", "!!map [1]", "0x_"]
)
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_value_that_is_none_is_one_line(reader: Callable[[Path], object], value: str, tmp_path: Path) -> None:
    path = tmp_path / "templates.yaml"
    path.write_text(f"pipeline: {value}\n")
    with pytest.raises(ConfigError, match=rf"^{path}") as caught:
        reader(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(yaml.YAMLError):
        load_yaml(f"a: {value}")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: &a [1, {b: c}]\nb: *a\n", {"a": [1, {"b": "c"}], "b": [1, {"b": "c"}]}),
        ("a: &a {x: 1}\nb: {<<: *a, y: 2}\n", {"a": {"x": 1}, "b": {"x": 1, "y": 2}}),
        ("- '" + "1" * 5000 + "'\n", ["1" * 5000]),
        ("- |\n  " + "1" * 5000 + "\n", ["1" * 5000 + "\n"]),
        ("- 1 word" + " and more" * 500 + "\n", ["1 word" + " and more" * 500]),
        ("2020-01-02: 0x1f\n", {date(2020, 1, 2): 31}),
    ],
    ids=["alias", "merge", "quoted digits", "block of digits", "plain text", "date"],
)
def test_a_file_within_bounds_is_read_as_ever(text: str, value: Any) -> None:
    assert load_yaml(text) == load_yaml(text.encode(), yaml.SafeLoader) == value
    assert load_all_yaml(f"{text}---\n{text}") == [value, value]


def test_anchors_are_those_of_their_document() -> None:
    with pytest.raises(yaml.YAMLError):
        load_all_yaml("a: &a 1\n---\nb: *a\n")


def peak_bytes() -> int:
    """The most memory that this process ever had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("loader", [yaml.Loader, yaml.FullLoader, yaml.UnsafeLoader])
def test_no_loader_that_makes_objects_is_taken(loader: type) -> None:
    with raises_naming(TypeError, loader.__name__):
        load_yaml("a: 1", loader)
