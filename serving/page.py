"""The web page at /: one self-contained file, with a Content-Security-Policy that allows no other script."""

import base64
import re
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal

from fastapi import FastAPI, Response
from pydantic import BaseModel, Field

HTML = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")


def headers() -> Mapping[str, str]:
    """The page's headers. The policy allows only its own script and style (by hash) and requests to this service."""
    policy = (
        "default-src 'none'",
        f"script-src '{_digest('script')}'",
        f"style-src '{_digest('style')}'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return {"Content-Security-Policy": "; ".join(policy), "Cache-Control": "no-cache"}


def _digest(element: str) -> str:
    (text,) = re.findall(rf"<{element}>(.*?)</{element}>", HTML, re.DOTALL)
    return f"sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}"


class About(BaseModel):
    """The served model, as the page shows it."""

    service: Literal["scorer", "gateway"]
    model: Annotated[str, Field(description="Name of the model")]
    version: Annotated[str, Field(description="Version of the scorer")]
    former: Annotated[
        str | None, Field(description="The previous version, which requests may still name; null if there is none")
    ]
    calibrated: Annotated[bool, Field(description="Whether responses include expected labels")]


def add_page(app: FastAPI, about: Callable[[], About]) -> None:
    """Adds GET / and GET /about, which the page requests first; they need no key."""
    policy = dict(headers())

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(HTML, media_type="text/html", headers=policy)

    @app.get("/about", tags=["probes"])
    async def read_about() -> About:
        """Describes the served model."""
        return about()
