"""docs/scale.md shows what the command prints and what the check found, and nothing older."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """benchmarks/scale_page.py."""
    spec = importlib.util.spec_from_file_location("scale_page", ROOT / "benchmarks/scale_page.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_holds_what_the_command_prints_and_the_check_detected(script: ModuleType) -> None:
    text = script.PAGE.read_text(encoding="utf-8")
    assert len(script.COMMAND.findall(text)) >= 3
    assert script.TABLE.search(text)
    assert script.page(text) == text, "docs/scale.md is older than what it shows; run python benchmarks/scale_page.py"


def test_a_number_that_was_changed_by_hand_is_seen(script: ModuleType) -> None:
    text = script.PAGE.read_text(encoding="utf-8")
    assert script.page(text.replace("151,781,384", "160,000,000")) == text
