"""A small OpenAI-compatible server that counts: what was asked, what was answered, and how often each."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from local_server import handled_by


@dataclass
class Model:
    """How the model behind the server behaves, and what it has seen.

    It answers with the instruction in capitals and the seed. Parameters in `refused` get a 400 that names them;
    `ignores_n` answers one choice whatever was asked, `copies_n` repeats one choice. A word at the head of an
    instruction makes it do something else (`TROUBLES`).
    """

    refused: tuple[str, ...] = ()
    ignores_n: bool = False
    copies_n: bool = False
    latency: float = 0.0
    asked: list[dict[str, Any]] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)
    paths: list[str] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reply(self, body: dict[str, Any], key: str, path: str) -> tuple[int, dict[str, Any]]:
        """Status and body."""
        with self.lock:
            self.asked.append(body)
            self.keys.add(key)
            self.paths.append(path)
        chat = "messages" in body
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        for name in self.refused:
            if name in body:
                message = f"Unsupported parameter: '{name}' is not supported with this model."
                return 400, {"error": {"message": message, "param": name, "code": "unsupported_parameter"}}
        if prompt.startswith(tuple(TROUBLES)):
            status, code, message = TROUBLES[prompt.split()[0]]
            return status, {"error": {"message": message.format(key=key), "code": code, "param": None}}
        time.sleep(self.latency)
        count = 1 if self.ignores_n or self.copies_n else body.get("n", 1)
        choices = [self._choice(prompt, body, number, chat) for number in range(count)]
        if self.copies_n:
            choices *= body.get("n", 1)
        usage = {"prompt_tokens": 10, "completion_tokens": 5 * count, "total_tokens": 10 + 5 * count}
        return 200, {"id": "1", "object": "x", "created": 0, "model": "m-2026", "choices": choices, "usage": usage}

    def _choice(self, prompt: str, body: Mapping[str, Any], number: int, chat: bool) -> dict[str, Any]:
        text: str | None = f" {prompt.upper()} {body.get('seed')}/{number} "
        finish, refusal = "stop", None
        match prompt.split()[0]:
            case "long":
                finish = "length"
            case "blank":
                text = ""
            case "cut":
                text, finish = "", "length"
            case "filtered":
                text, finish = None, "content_filter"
            case "refuse":
                text, refusal = None, "I cannot help with that."
            case "same":
                text = "the same"
        with self.lock:
            self.answered[f"{prompt}|{body.get('seed')}|{number}|{body.get('temperature')}|{body.get('top_p')}"] += 1
        choice: dict[str, Any] = {"index": number, "finish_reason": finish, "logprobs": None}
        if body.get("logprobs") and text:
            tokens = [{"token": "X", "logprob": -0.5, "bytes": None, "top_logprobs": []}] * 2
            choice["logprobs"] = {"content": tokens} if chat else {"token_logprobs": [-0.5, -0.5]}
        if chat:
            return {**choice, "message": {"role": "assistant", "content": text, "refusal": refusal}}
        return {**choice, "text": text}


TROUBLES = {
    "unauthorized": (401, "invalid_api_key", "Incorrect API key provided: {key}"),
    "forbidden": (403, "forbidden", "not yours"),
    "absent": (404, "model_not_found", "The model 'm' does not exist"),
    "endless": (400, "context_length_exceeded", "This model's maximum context length is 8 tokens; reduce max_tokens."),
    "wicked": (400, "content_filter", "The response was filtered"),
    "odd": (400, "invalid_value", "max_tokens is too large: 64"),
    "broke": (429, "insufficient_quota", "You exceeded your current quota"),
}


@contextmanager
def serving(model: Model) -> Iterator[str]:
    """The address of a server with this model."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with model.lock:
                model.at_once += 1
                model.most_at_once = max(model.most_at_once, model.at_once)
            try:
                key = (self.headers["Authorization"] or "").removeprefix("Bearer ")
                status, answer = model.reply(body, key, self.path)
            finally:
                with model.lock:
                    model.at_once -= 1
            data = json.dumps(answer).encode()
            # One write, or small packets wait for each other.
            self.wfile.write(
                f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode()
                + data
            )

    with handled_by(Handler) as address:
        yield f"{address}/v1"
