"""The body of a request, read by both services: within a size and a time, and no defect where the client hangs up."""

import asyncio

from fastapi import Request
from starlette.requests import ClientDisconnect

from serving.refusals import Refusal

GONE = 499
"""What the log calls a request whose client hung up (a custom of nginx)."""
SECONDS = 20.0
"""Within which a body must have arrived."""


async def received(request: Request, most: int, remedy: str, seconds: float = SECONDS) -> bytes:
    """The body; Refusal 413 above `most` bytes, announced or not, and 408 where it does not arrive in time."""
    large = Refusal(413, f"the body is above {most} bytes; {remedy}")
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > most:
        raise large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise large
    except ClientDisconnect as error:
        raise Refusal(GONE, "the client hung up") from error
    except TimeoutError as error:
        raise Refusal(408, f"the body did not arrive within {seconds:g} s; send it again") from error
    return bytes(body)
