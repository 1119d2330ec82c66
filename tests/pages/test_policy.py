"""What a browser may do with a page that this project writes: its own scripts and styles, and nothing else."""

import re
from collections.abc import Callable, Iterator
from functools import cache
from html import unescape
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from chromium import launched, needs_chromium
from local_server import handled_by

from cappy.annotation.report import data_report_page, summarize
from cappy.evaluation import Report, evaluate
from cappy.evaluation import page as scorer_page
from cappy.records import Candidate, Instance
from cappy.records.schema import to_table

BAIT = "the-bait"


def instance(index: int, split: str = "test") -> Instance:
    candidates = tuple(
        Candidate(
            response=f"{index} {position} {BAIT}",
            generator="one" if position % 2 else "two",
            labels={"m": ((index * 7 + position * 3) % 10) / 10},
        )
        for position in range(4)
    )
    values: dict[str, Any] = {"split": split, "references": ("yes",), "candidates": candidates}
    said, task = f"say {index} {BAIT}", f"{BAIT}-{index % 3}"
    return Instance(instance_id=f"{split}-{index}", instruction=said, task=task, **values)


INSTANCES = [*map(instance, range(40)), *(instance(index, "validation") for index in range(100, 110))]


def score(pairs: Any) -> list[float]:
    return [len(response) / 10 for _, response in pairs]


@cache
def evaluated() -> Report:
    return evaluate(INSTANCES, score=score, metric="m")


@cache
def scorer_report() -> str:
    return scorer_page.render(evaluated())


@cache
def data_report() -> str:
    return data_report_page.render(summarize(to_table(INSTANCES).to_batches(), "m"))


PAGES = {"scorer report": scorer_report, "data report": data_report}
pages = pytest.mark.parametrize("make", PAGES.values(), ids=PAGES)

ATTACKS = {
    "script": "<script>window.hit = 1; document.title = 'hit'</script>",
    "source": "<script src='SERVER/x.js'></script>",
    "handler": "<img src=x onerror='window.hit = 1'>",
    "picture": "<img src='SERVER/pixel.png'>",
    "frame": "<iframe src='SERVER/'></iframe><object data='SERVER/'></object>",
    "style": "<style>body { display: none } @import 'SERVER/x.css';</style>",
    "sheet": "<link rel=stylesheet href='SERVER/x.css'><link rel=preload as=image href='SERVER/'>",
    "base": "<base href='SERVER/'>",
    "svg": "<svg onload='window.hit = 1'><image href='SERVER/pixel.png'/></svg>",
    "background": "<div style='background: url(SERVER/pixel.png)'>x</div>",
    "link": "<a id=attack href='javascript:window.hit = 1'>x</a>",
}


@pages
def test_equal_reports_make_equal_pages_with_one_policy_before_all_that_it_governs(make: Callable[[], str]) -> None:
    html = make()
    assert html == make.__wrapped__()  # type: ignore[attr-defined]
    assert html.count("Content-Security-Policy") == 1
    head, escaped, rest = re.split(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', html)
    policy = unescape(escaped)
    assert not re.search("<(script|style|link|img|svg)", head)
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    scripts = re.search(r"script-src ([^;]*)", policy)
    assert scripts is not None
    assert "unsafe" not in scripts[1]
    # Nothing but what the policy names by hash: plots bring no styles of their own, handlers are not inline.
    assert rest.count("<style") == 1
    assert rest.count("<script") == scripts[1].count("sha256-")
    assert not re.search(r"<[^>]* on\w+=", rest)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as opened:
        yield opened


def opened(browser: Any, path: Path, width: int = 1100) -> tuple[Any, list[str], list[str]]:
    """The page, what it asked the network for, and what the browser complained of."""
    asked: list[str] = []
    messages: list[str] = []
    view = browser.new_page(viewport={"width": width, "height": 900})
    view.on("request", lambda request: asked.append(request.url) if not request.url.startswith("file:") else None)
    view.on("console", lambda message: messages.append(message.text))
    view.on("pageerror", lambda error: messages.append(str(error)))
    view.goto(path.as_uri())
    return view, asked, messages


@needs_chromium
@pages
@pytest.mark.parametrize("width", [1100, 390])
def test_a_page_draws_all_that_it_has_under_its_policy(
    browser: Any, make: Callable[[], str], width: int, tmp_path: Path
) -> None:
    (tmp_path / "page.html").write_text(make(), encoding="utf-8")
    view, asked, messages = opened(browser, tmp_path / "page.html", width)
    assert (asked, messages) == ([], [])
    assert view.evaluate("getComputedStyle(document.querySelector('main')).maxWidth") == "1080px"
    assert view.evaluate("getComputedStyle(document.querySelector('svg path')).strokeLinecap") == "butt"
    bars = view.evaluate(
        "[...document.querySelectorAll('.bar i')].filter(bar => bar.getBoundingClientRect().width > 0).length"
    )
    assert bars > 0 or width == 390
    strokes = view.evaluate(
        "[...document.querySelectorAll('svg path')].map(one => getComputedStyle(one)).flatMap(one => [one.fill, "
        "one.stroke]).filter(colour => colour.startsWith('rgb') && colour !== 'rgb(0, 0, 0)').length"
    )
    assert strokes > 0
    assert view.locator("th button").count() == view.locator("table.sorted th").count()
    view.close()


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A server that an attack calls, and what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"window.hit = 1")

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with handled_by(Handler) as address:
        yield address, asked


def attacked(browser: Any, html: str, path: Path, asked: list[str]) -> bool:
    """Whether anything of the attack came to be: a program ran, a server was asked, the page changed."""
    path.write_text(html, encoding="utf-8")
    view, _, _ = opened(browser, path)
    if view.locator("#attack").count():
        view.evaluate("document.getElementById('attack').click()")
    view.wait_for_timeout(100)
    hit = view.evaluate("window.hit") == 1
    hidden = view.evaluate("getComputedStyle(document.body).display") == "none"
    based = view.evaluate("document.baseURI").startswith("http:")
    view.close()
    return hit or hidden or based or bool(asked)


@needs_chromium
@pages
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_what_came_into_a_page_loads_and_runs_nothing(
    browser: Any, make: Callable[[], str], attack: str, server: tuple[str, list[str]], tmp_path: Path
) -> None:
    """As if escaping had failed in twenty places; without the policy the same page is taken over."""
    address, asked = server
    html = make()
    assert html.count(BAIT) > 2
    hostile = html.replace(BAIT, attack.replace("SERVER", address), 20)
    assert not attacked(browser, hostile, tmp_path / "page.html", asked)
    bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", hostile)
    assert attacked(browser, bare, tmp_path / "bare.html", asked)
