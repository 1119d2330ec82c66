"""OpenAI's own client, the gateway, and `transformers serve`, none of whose servers are ours but the one between."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from gateway_server import gateway, listening, scoring

from serving.gateway.config import Policy

MESSAGES: list[Any] = [{"role": "user", "content": "the cat sat"}]
SAMPLED: dict[str, Any] = {"max_tokens": 8, "temperature": 1.0, "seed": 1}


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="x", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def url(transformers_server: str) -> Iterator[str]:
    policy = Policy(candidates=4, min_gain=0)
    with listening(gateway(transformers_server, policy=policy, scoring=scoring(lambda text: len(text) / 100))) as url:
        yield url


def test_the_client_gets_the_best_of_real_samples_streaming_or_not(client: openai.OpenAI, causal_folder: Path) -> None:
    answer = client.chat.completions.create(
        model=str(causal_folder), messages=MESSAGES, extra_headers={"X-Cappy-Candidates": "1"}, **SAMPLED
    )
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 4
    assert 4 <= answer.usage.completion_tokens <= 32
    actual = answer.model_extra["cappy"]["candidates"]
    assert len(actual) == 4
    assert (answer.choices[0].message.content or "").strip() == max(actual, key=lambda one: one["score"])["content"]
    stream = client.chat.completions.create(model=str(causal_folder), messages=MESSAGES, stream=True, **SAMPLED)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces)


def test_the_asynchronous_client_does_too(url: str, causal_folder: Path) -> None:
    async def both() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as client:
            answer, stream = await asyncio.gather(
                client.chat.completions.create(model=str(causal_folder), messages=MESSAGES, **SAMPLED),
                client.chat.completions.create(model=str(causal_folder), messages=MESSAGES, stream=True, **SAMPLED),
            )
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return answer.choices[0].message.content or "", "".join(pieces)

    whole, streamed = asyncio.run(both())
    assert whole
    assert streamed


def test_what_the_server_refuses_is_reported_as_its_own(client: openai.OpenAI, tmp_path: Path) -> None:
    with pytest.raises(openai.APIStatusError, match=r"^[^\n]*the LLM [^\n]*4\d\d"):
        client.chat.completions.create(model=f"{tmp_path}/none", messages=MESSAGES, **SAMPLED)
