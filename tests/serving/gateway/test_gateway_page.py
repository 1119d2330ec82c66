"""The gateway's page in a real browser, in front of a small server in place of an LLM."""

import pytest
from chat_server import Model, serving
from chromium import launched, needs_chromium
from gateway_server import gateway, listening, sampled
from wording import assert_names

from serving.gateway.upstream import LLM, Upstream


@needs_chromium
@pytest.mark.parametrize("width", [1100, 390], ids=["laptop", "phone"])
def test_the_page_asks_the_llm_and_shows_every_candidate_with_its_score(width: int) -> None:
    messages: list[str] = []
    policy = sampled(candidates=3, min_gain=0)
    with (
        serving(Model()) as llm,
        launched() as browser,
        listening(gateway(llm, upstream=Upstream(LLM(url=llm, model="m")), policy=policy)) as url,
    ):
        view = browser.new_page(viewport={"width": width, "height": 900})
        view.on("console", lambda message: messages.append(message.text))
        view.on("pageerror", lambda error: messages.append(str(error)))
        view.goto(url.removesuffix("/v1"))
        view.wait_for_selector("#chat:not([hidden])")
        assert view.input_value("#llm") == "m"
        view.fill("#prompt", "hello")
        view.keyboard.press("Control+Enter")
        view.wait_for_selector("#outcome:not([hidden])")
        scores = [float(text) for text in view.locator(".number").all_inner_texts()]
        texts = view.locator("li .text").all_inner_texts()
        assert len(scores) == len(texts) == 3
        assert scores == sorted(scores, reverse=True)
        assert all(text.startswith("HELLO") for text in texts)
        assert_names(view.inner_text("#headline"), "candidate 1 of 3", f"{scores[0]:.3f}")
        assert_names(view.inner_text("#legend"), "tokens", "all candidates")
        assert view.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert messages == []
