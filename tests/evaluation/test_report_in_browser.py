"""The page in a real browser: it opens from the disk, needs no network, fits a phone, and its tables sort."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from chromium import launched, needs_chromium

from cappy.evaluation import evaluate, page
from cappy.records import Instance

Score = Callable[[Sequence[tuple[str, str]]], list[float]]

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as opened:
        yield opened


@pytest.fixture
def path(tmp_path: Path, make_instance: Callable[..., Instance], score: Score) -> Path:
    names = ("north", "east", "south", "west")
    instances = [make_instance(index, task=names[index % 4]) for index in range(40)]
    held = [make_instance(index, split="validation") for index in range(100, 120)]
    report = evaluate([*instances, *held], score=score)
    (tmp_path / "report.html").write_text(page.render(report), encoding="utf-8")
    return tmp_path / "report.html"


@pytest.fixture
def opened(browser: Any, path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Any, list[str]]]:
    """The page, and everything that it asked the network for or complained of."""
    messages: list[str] = []
    view = browser.new_page(viewport={"width": getattr(request, "param", 1100), "height": 900})
    view.on("request", lambda asked: messages.append(asked.url) if not asked.url.startswith("file:") else None)
    view.on("console", lambda message: messages.append(message.text))
    view.on("pageerror", lambda error: messages.append(str(error)))
    view.goto(path.as_uri())
    yield view, messages
    view.close()


def column(view: Any, index: int) -> list[str]:
    texts: list[str] = view.locator(f"table.sorted >> nth=0 >> tbody tr td:nth-child({index})").all_inner_texts()
    return texts


@pytest.mark.parametrize("opened", [1100, 390], indirect=True, ids=["laptop", "phone"])
def test_the_page_needs_nothing_and_fits_the_width(opened: tuple[Any, list[str]]) -> None:
    view, messages = opened
    assert messages == []
    width, env = view.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width <= env
    shown = [plot for plot in view.locator("section svg").all() if plot.is_visible()]
    assert len(shown) == 2
    assert view.locator("h1").inner_text().startswith("The selector")


def test_a_click_on_a_head_sorts_by_numbers_and_a_second_turns_the_order(opened: tuple[Any, list[str]]) -> None:
    view, messages = opened
    head = view.locator("table.sorted >> nth=0 >> th").nth(2).locator("button")
    for reverse in (True, False):
        head.click()
        values = [float(text.replace("−", "-")) for text in column(view, 3)]
        assert values == sorted(values, reverse=reverse)
        assert len(set(values)) > 1
    view.locator("table.sorted >> nth=0 >> th").first.locator("button").press("Enter")
    assert column(view, 1) == ["west", "south", "north", "east"]
    assert messages == []


def test_the_average_stays_below_the_sorted_tasks(opened: tuple[Any, list[str]]) -> None:
    view, _ = opened
    view.locator("table.sorted >> nth=0 >> th button").first.click()
    assert view.locator("table.sorted >> nth=0 >> tr").last.inner_text().startswith("average")
