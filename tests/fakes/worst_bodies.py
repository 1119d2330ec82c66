"""Bodies that cost a service the most, of many kinds, and what each costs a running one."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
from local_server import handled_by
from processes import free_port
from waiting import wait_until

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from scoring_function import FakeEngine, model
from cappy.scoring.encoding import EncodedPair
from serving import server
from serving.config import ServeConfig

class Engine(FakeEngine):
    def encode(self, pairs):
        return [EncodedPair(ids=(1, -1, 1), types=()) for _ in pairs]

server.serve(lambda: model(Engine(remembers=False)), ServeConfig(port=int(sys.argv[2])))
"""
"""A service whose scorer costs nothing, whatever it reads."""
MEGABYTES = 8_000_000
CHAT = '{"model": "m", "messages": [{"role": "user", "content": "hello"}], %s}'
PLACES: Mapping[str, tuple[str, str]] = {
    "score": ("/score", '{"pairs": %s}'),
    "select": ("/select", '{"instruction": "a", "responses": %s}'),
    "cohere": ("/v2/rerank", '{"query": "a", "documents": %s}'),
    "rerank": ("/rerank", '{"query": "a", "documents": %s}'),
    "tei_rerank": ("/rerank", '{"query": "a", "texts": %s}'),
    "tei_predict": ("/predict", '{"inputs": %s}'),
    "vllm": ("/v1/score", '{"text_1": "a", "text_2": %s}'),
    "vertex": ("/predict", '{"instances": %s}'),
    "mlflow_split": ("/invocations", '{"dataframe_split": {"columns": ["instruction", "response"], "data": %s}}'),
    "mlflow_rows": ("/invocations", '{"instances": %s}'),
    "open_inference": (
        "/v2/models/cappy/infer",
        '{"inputs": [{"name": "instruction", "datatype": "BYTES", "shape": [9], "data": %s}]}',
    ),
    "openrlhf": ("/get_reward", '{"query": ["a"], "prompts": %s}'),
}
"""Name -> path of the service, and a body with the place of a list in it."""
CHAT_PLACES: Mapping[str, tuple[str, str]] = {
    "messages": ("/v1/chat/completions", '{"model": "m", "messages": %s}'),
    "content": ("/v1/chat/completions", '{"model": "m", "messages": [{"role": "user", "content": %s}]}'),
    "modalities": ("/v1/chat/completions", CHAT % '"modalities": %s'),
    "stream_options": ("/v1/chat/completions", CHAT % '"stream": true, "stream_options": %s'),
    "unread field": ("/v1/chat/completions", CHAT % '"logit_bias": %s'),
    "feedback": ("/v1/feedback", '{"id": "x", "reference": %s}'),
}


def kinds(size: int, values: int) -> Iterator[tuple[str, bytes]]:
    """(kind, JSON to put into a place): up to `size` bytes, and with as many as `values` values, which passes on."""

    def many(item: str, count: int, around: str = "[]") -> bytes:
        return f"{around[0]}{','.join([item] * count)}{around[1]}".encode()

    for name, item in {
        "numbers": "1",
        "fractions": "1.5e300",
        "endless numbers": "1e400",
        "long numbers": "9" * 4000,
        "empty lists": "[]",
        "empty objects": "{}",
        "objects": '{"a":1}',
        "short texts": '"a"',
        "empty texts": '""',
        "escapes": '"\\\\\\""',
        "nulls": "null",
        "pairs": '["a","b"]',
        "pairs of numbers": "[1,1]",
        "rows": '{"instruction":"a","response":1}',
        "turns": '{"role":"user","content":"a"}',
        "parts": '{"type":"text","text":"a"}',
    }.items():
        yield f"{name}, as many bytes as may be", many(item, size // (len(item) + 1))
        own = 1 + item.count(",") + item.count("[") + item.count("{")
        count = min(size // (len(item) + 1), values // own)
        yield f"{name}, as many values as may be", many(item, count)
    for name, text in {
        "a long text": "a" * size,
        "a wide text": "\U0001f600" * (size // 4),
        "backslashes": "\\\\" * (size // 2),
        "quotes": '\\"' * (size // 2),
        "escaped characters": "\\u4e2d" * (size // 6),
    }.items():
        yield name, f'"{text}"'.encode()
        yield f"{name} in a list", f'["{text}"]'.encode()
    for name, count in (("as many bytes", size // 10), ("as many values", values)):
        named = ",".join(f'"{key:07}":1' for key in range(count))
        yield f"keys, {name} as may be", f"{{{named}}}".encode()
        yield f"an object of keys, {name} as may be", f'[{{"text":"a",{named}}}]'.encode()
    long = "k" * (size // 2)
    yield "a long key", f'{{"{long}":1}}'.encode()
    yield "lists in lists", b"[" * size
    yield "lists in lists, closed", b"[" * (size // 2) + b"]" * (size // 2)
    yield "objects in objects", b'{"a":' * (size // 5)
    text = "x" * (size // 1100)
    yield "1024 texts", many(f'"{text}"', 1024)
    yield "1024 pairs", many(f'["{text[9:]}","b"]', 1024)
    yield "pages of text", many(json.dumps("lorem ipsum " * 12_000), size // 150_000)


def bodies(places: Mapping[str, tuple[str, str]], size: int, values: int) -> Iterator[tuple[str, str, bytes]]:
    """(name, path, body) of every kind in every place."""
    for place, (path, template) in places.items():
        before, after = (part.encode() for part in template.split("%s"))
        for kind, part in kinds(size - len(before) - len(after) - 64, values - 32):
            yield f"{place}: {kind}", path, before + part + after


def tensors(size: int) -> Iterator[tuple[str, str, bytes, Mapping[str, str]]]:
    """(name, path, body, headers) of binary tensors: elements without length, and very many tensors."""
    path = "/v2/models/cappy/infer"
    for name, count, length in (("elements without length", 1, size - 1000), ("many tensors", 8000, 4)):
        parameters = {"parameters": {"binary_data_size": length}}
        head = json.dumps({"inputs": [parameters] * count}).encode()
        left = (size - len(head)) // 4 * 4
        headers = {"inference-header-content-length": str(len(head)), "content-type": "application/octet-stream"}
        yield f"open_inference: {name}", path, head + bytes(left), headers


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a body cost: status, seconds, megabytes above its start, the longest wait for /health beside it."""

    name: str
    status: int
    seconds: float
    megabytes: float
    health_seconds: float


class Watched:
    """A running service, its memory, and a client that asks for /health all the time."""

    def __init__(self, process: int, address: str) -> None:
        self._process = process
        self._address = address
        self._client = httpx.Client(timeout=60)
        self._longest = 0.0
        self._status = Path(f"/proc/{process}/status")
        self._before = _kilobytes(self._status, "VmRSS")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def cost(self, name: str, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> Cost:
        """Sends one body and measures."""
        Path(f"/proc/{self._process}/clear_refs").write_text("5")  # the peak begins anew
        self._longest = 0.0
        started = time.monotonic()
        answer = self._client.post(
            self._address + path, content=body, headers={"content-type": "application/json", **(headers or {})}
        )
        seconds = time.monotonic() - started
        time.sleep(0.05)
        peak = _kilobytes(self._status, "VmHWM")
        return Cost(
            name=name,
            status=answer.status_code,
            seconds=round(seconds, 3),
            megabytes=round((peak - self._before) / 1000, 1),
            health_seconds=round(self._longest, 3),
        )

    def close(self) -> None:
        """Stops asking."""
        self._done.set()
        self._thread.join()
        self._client.close()

    def _ask(self) -> None:
        with httpx.Client(timeout=60) as client:
            while not self._done.wait(0.02):
                started = time.monotonic()
                assert client.get(f"{self._address}/health").status_code == 200
                self._longest = max(self._longest, time.monotonic() - started)


def _kilobytes(status: Path, field: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(f"{field}:"))


@contextlib.contextmanager
def service(*words: str) -> Iterator[Watched]:
    """`cappy serve` around a scorer that costs nothing; with words, `cappy gateway` in front of it and of no LLM."""
    port = free_port()
    fakes = str(Path(__file__).parent)
    with _running([sys.executable, "-c", PROGRAM, fakes, str(port)], port, "ready") as process:
        if not words:
            yield from _watched(process, port)
            return
        gateway, scorer = free_port(), f"http://127.0.0.1:{port}"
        program = "from cappy.cli import main; main()"
        with handled_by(NoLLM) as upstream:
            command = ["gateway", "--upstream", upstream, "--scorer", scorer, "--port", str(gateway), *words]
            with _running([sys.executable, "-c", program, *command], gateway, "health") as process:
                yield from _watched(process, gateway)


def _watched(process: int, port: int) -> Iterator[Watched]:
    result = Watched(process, f"http://127.0.0.1:{port}")
    try:
        yield result
    finally:
        result.close()


@contextlib.contextmanager
def _running(command: list[str], port: int, wait_for: str) -> Iterator[int]:
    url = f"http://127.0.0.1:{port}/{wait_for}"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ}) as process:
        try:
            wait_until(lambda: _answers(url), f"an answer of {url}", seconds=90, pause=0.1, process=process)
            yield process.pid
        finally:
            process.kill()


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url).status_code == 200
    return False


class NoLLM(BaseHTTPRequestHandler):
    """A server that reads a request and answers it with one short choice."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_POST(self) -> None:
        """One choice."""
        left = int(self.headers["Content-Length"])
        while left:
            left -= len(self.rfile.read(min(left, 1 << 20)))
        message: dict[str, Any] = {"role": "assistant", "content": "yes"}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        data = json.dumps({"id": "1", "model": "m", "choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
