"""Templates of a test's own, and PromptSource's beside the project."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cappy.preparation.templates import Template

SHARED = Path(__file__).parents[3].parent / "shared/data"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The real data; a test that asks for it is skipped where there is none."""
    if not SHARED.is_dir():
        pytest.skip("the real templates and rows are not beside the project")
    return SHARED


@pytest.fixture(scope="session")
def real_templates(shared: Path) -> Path:
    """The folder of PromptSource's template files."""
    return shared / "templates/templates"


@pytest.fixture
def template() -> Callable[..., Template]:
    """template(jinja, answer_choices=""): a template called 'mine' of the dataset 'ours'."""

    def made(jinja: str, answer_choices: str = "") -> Template:
        return Template(name="mine", id="7", dataset="ours", jinja=jinja, answer_choices=answer_choices)

    return made
