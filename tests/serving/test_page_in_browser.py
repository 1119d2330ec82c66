"""The page in a real browser, in front of a real server with a function in place of a scorer."""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from shutil import which
from typing import Any

import pytest
import uvicorn
from calibrations import straight
from chromium import launched, needs_chromium
from scoring_function import FakeEngine, model
from waiting import wait_until
from wording import assert_names

from serving.app import Options, create_app
from serving.config import RequestLimits
from serving.engine import Models
from serving.guards import Keys

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as opened:
        yield opened


@pytest.fixture
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    """A service whose score is a tenth of a response's length; it is calibrated, and has one version before."""
    options = getattr(request, "param", Options())
    engine = FakeEngine(score=lambda pair: min(len(pair[1]), 12) / 10)
    now = model(engine, calibration=straight({1: 1.2, 2: 0.6}, score=1.2))
    before = model(FakeEngine(score=lambda pair: 0.25), version="older")
    server = uvicorn.Server(
        uvicorn.Config(create_app(Models(now, before), options), port=0, log_level="error", lifespan="on")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started, "the service to listen", pause=0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def opened(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[tuple[Any, list[str]]]:
    """The page, and everything that it asked of others or complained of."""
    width, scheme = getattr(request, "param", (1100, "light"))
    messages: list[str] = []
    view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    view.on("request", lambda asked: None if asked.url.startswith((address, "data:")) else messages.append(asked.url))
    view.on("console", lambda message: messages.append(message.text))
    view.on("pageerror", lambda error: messages.append(str(error)))
    view.goto(address)
    view.wait_for_selector("#score:not([hidden])")
    yield view, messages
    view.close()


def fill(view: Any) -> None:
    view.fill("#instruction", "Name a fruit")
    view.fill("[aria-label='Response 1']", "a")
    view.fill("[aria-label='Response 2']", "<b>pear</b>")


@pytest.mark.parametrize("opened", [(1100, "light"), (390, "dark")], indirect=True, ids=["laptop", "phone"])
def test_the_page_scores_with_the_keyboard_alone_and_marks_the_pick(opened: tuple[Any, list[str]]) -> None:
    view, messages = opened
    assert "version abc" in view.inner_text("#about")
    view.focus("#instruction")
    view.keyboard.type("Name a fruit")
    for number, text in enumerate(("a", "<b>pear</b>"), start=1):
        while view.evaluate("document.activeElement.getAttribute('aria-label')") != f"Response {number}":
            view.keyboard.press("Tab")
        view.keyboard.type(text)
    view.keyboard.press("Control+Enter")
    view.wait_for_selector("#outcome:not([hidden])")
    assert_names(view.inner_text("#headline"), "response 2", "1.100")
    picks = view.locator("li.pick")
    assert picks.count() == 1
    assert "<b>pear</b>" in picks.inner_text(), "text, not markup"
    assert view.locator(".number").all_inner_texts() == ["0.100", "0.050", "1.100", "0.550"]
    assert view.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "it fits the width"
    assert messages == []


def test_two_versions_are_compared(opened: tuple[Any, list[str]]) -> None:
    view, messages = opened
    fill(view)
    view.check("#compare")
    view.click("#score button.main")
    view.wait_for_selector("#outcome:not([hidden])")
    assert view.locator(".number").all_inner_texts() == ["0.100", "0.050", "0.250", "1.100", "0.550", "0.250"]
    assert messages == []


def test_the_request_is_copied_as_curl_and_python_and_works(opened: tuple[Any, list[str]], address: str) -> None:
    view, _ = opened
    view.context.grant_permissions(["clipboard-read", "clipboard-write"])
    fill(view)
    view.fill("#instruction", 'What\'s "it"?')
    view.keyboard.press("Control+Enter")
    view.wait_for_selector("#outcome:not([hidden])")
    for kind, command in (("curl", ["bash", "-c"]), ("python", [sys.executable, "-c"])):
        view.click(f"[data-copy={kind}]")
        view.wait_for_selector("#copied:has-text('Copied.')")
        text = view.evaluate("navigator.clipboard.readText()")
        if kind == "curl" and which("curl") is None:
            continue
        done = subprocess.run([*command, text], capture_output=True, text=True, timeout=20)
        assert "1.1" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "address", [Options(limits=RequestLimits(max_characters=5), keys=Keys(["right-key"]))], indirect=True, ids=["keys"]
)
def test_errors_are_sentences_and_a_missing_key_is_asked_for(opened: tuple[Any, list[str]]) -> None:
    view, _ = opened
    fill(view)
    view.keyboard.press("Control+Enter")
    view.wait_for_selector("#error:not(:empty)")
    assert re.fullmatch(r"[A-Z].*API key.*\.", view.inner_text("#error"))
    assert view.evaluate("document.activeElement.id") == "key"
    view.fill("#key", "right-key")
    view.focus("#instruction")
    view.keyboard.press("Control+Enter")
    view.wait_for_selector("#error:has-text('characters')")
    assert re.fullmatch(r"[A-Z].*12 characters.*\b5\b.*\.", view.inner_text("#error"))
    assert view.is_hidden("#outcome")


@pytest.mark.parametrize("address", [Options(keys=Keys(["right-key"]))], indirect=True, ids=["keys"])
def test_a_copied_request_names_a_variable_in_place_of_the_key_and_works(
    opened: tuple[Any, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    view, _ = opened
    monkeypatch.setenv("API_KEY", "right-key")
    fill(view)
    view.evaluate("document.getElementById('access').open = true")
    view.fill("#key", "right-key")
    view.click("#score button.main")
    view.wait_for_selector("#outcome:not([hidden])")
    for kind, command in (("curl", ["bash", "-c"]), ("python", [sys.executable, "-c"])):
        view.click(f"[data-copy={kind}]")
        text = view.inner_text("#request")
        assert "right-key" not in text
        if kind == "curl" and which("curl") is None:
            continue
        done = subprocess.run([*command, text], capture_output=True, text=True, timeout=20)
        assert "1.1" in done.stdout, done.stderr


def test_scores_that_are_close_have_the_digits_that_tell_them_apart(opened: tuple[Any, list[str]]) -> None:
    view, _ = opened
    for values, digits in (("[0.12341, 0.12344]", 5), ("[0.5, 0.5, 0.5001]", 4), ("[0.5]", 3), ("[0.1, 0.1]", 3)):
        assert view.evaluate(f"digitsOf({values})") == digits
