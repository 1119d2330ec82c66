"""Server-sent events: the chosen answer as a stream, with comments that keep the connection while it is sampled."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

from serving.gateway.answering import Outcome
from serving.gateway.errors import GatewayError

KEEP_ALIVE_SECONDS = 5.0
"""A proxy or a client that hears nothing gives up; OpenAI's clients skip comments."""
_COMMENT = ": sampling\n\n"


async def events(
    work: "asyncio.Task[Outcome]", told: Callable[[Outcome], Iterator[Mapping[str, Any]]], *, keep_alive: float
) -> AsyncIterator[str]:
    """The chunks of the outcome as events, `[DONE]` last; a comment at once and each `keep_alive` seconds until then.

    A GatewayError becomes an event with OpenAI's error object, which its clients raise. The work is cancelled when the
    client goes.
    """
    try:
        while not work.done():
            yield _COMMENT
            await asyncio.wait({work}, timeout=keep_alive)
        for chunk in told(work.result()):
            yield event(chunk)
        yield "data: [DONE]\n\n"
    except GatewayError as problem:
        yield event(problem.body())
    finally:
        work.cancel()


def event(values: Mapping[str, Any]) -> str:
    """One event."""
    return f"data: {json.dumps(values)}\n\n"
