"""A server that answers by a function of the request: what one test needs, written in that test."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from local_server import handled_by

Reply = tuple[int, Any] | tuple[int, Any, Mapping[str, str]]
"""Status, body (bytes, or values for JSON), and further headers."""


@dataclass
class Script:
    """`reply` answers a body; `bodies`, `paths` and `headers` hold the requests in order of arrival."""

    reply: Callable[[dict[str, Any]], Reply]
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def prompt_of(body: Mapping[str, Any]) -> str:
    """The instruction of a request."""
    return str(body["messages"][-1]["content"] if "messages" in body else body.get("prompt", ""))


def saying(text: str | None, finish: object = "stop", **more: Any) -> dict[str, Any]:
    """A completion with one choice."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish, **more}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    return {"id": "1", "object": "chat.completion", "model": "m-2026", "choices": [choice], "usage": usage}


def refusing(message: str, **more: Any) -> dict[str, Any]:
    """An error object."""
    return {"error": {"message": message, **more}}


@contextmanager
def scripted(script: Script) -> Iterator[str]:
    """The address of the server, without a path."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(length)) if length else {}
            with script.lock:
                script.bodies.append(body)
                script.paths.append(self.path)
                script.headers.append({name.lower(): value for name, value in self.headers.items()})
            status, values, *more = script.reply(body)
            data = values if isinstance(values, bytes) else json.dumps(values, ensure_ascii=False).encode()
            headers = {"Content-Type": "application/json", **(more[0] if more else {}), "Content-Length": len(data)}
            head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            self.wfile.write(f"HTTP/1.1 {status} X\r\n{head}\r\n".encode() + data)

        do_GET = do_POST  # noqa: N815 (the library's name)

    with handled_by(Handler) as address:
        yield address
