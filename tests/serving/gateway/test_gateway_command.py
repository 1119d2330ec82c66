"""`cappy gateway` as a process of its own, with the built-in scorer; and where scores come from."""

import asyncio
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import httpx
import pytest
import uvicorn
from calibrations import straight
from chat_server import Model, serving
from local_server import handled_by
from scoring_function import FakeEngine, model
from waiting import wait_until
from wording import assert_names, raises_naming

import serving as service
from cappy.errors import ConfigError
from serving.engine import Models
from serving.gateway.errors import GatewayError
from serving.gateway.scoring import Scoring, load
from serving.guards import Keys

CANARY = "sk-canary-4f1d9a"
PROGRAM = "from cappy.cli import main; main()"
Start = Callable[..., tuple["subprocess.Popen[str]", str, str]]


def command(*words: object, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "gateway", *map(str, words)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )


@contextmanager
def scoring_service(*keys: str) -> Iterator[str]:
    """The address of a service that scores responses by their length."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        engine = FakeEngine(score=lambda pair: float(len(pair[1])))
        app = service.create_app(Models(model(engine, version="a" * 12)), service.Options(keys=Keys(keys)))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="warning", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        wait_until(lambda: httpx.get(f"{address}/ready").status_code == 200, "a ready service", seconds=20)
        yield address
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def scorer() -> Iterator[str]:
    with scoring_service() as address:
        yield address


@pytest.fixture
def start(scorer: str) -> Iterator[Start]:
    processes: list[subprocess.Popen[str]] = []

    def started(*words: object, **environment: str) -> tuple["subprocess.Popen[str]", str, str]:
        process = command(*words, "--scorer", scorer, "--port", 0, **environment)
        processes.append(process)
        assert process.stderr is not None
        assert select.select([process.stderr], [], [], 60)[0]
        line = process.stderr.readline()
        address = re.search(r" at (http://127\.0\.0\.1:\d+/v1)\n", line)
        assert address, line + process.stderr.read()
        return process, address[1], line

    yield started
    for process in processes:
        process.kill()
        process.communicate()


def ask(url: str, **more: object) -> httpx.Response:
    body = {"model": "m", "messages": [{"role": "user", "content": "Sort: pear fig"}], **more}
    return httpx.post(f"{url}/chat/completions", json=body, timeout=30)


def test_the_command_answers_says_what_its_scores_are_and_sigterm_lets_a_request_finish(
    start: Start, tmp_path: Path
) -> None:
    model = Model(latency=1.0)
    (tmp_path / "calibration.json").write_text(straight({1: 0.9}).to_json())
    with serving(model) as upstream:
        words = ("--upstream", upstream, "--key-variable", "MY_KEY", "--feedback", tmp_path / "log")
        process, url, line = start(*words, "--calibration", tmp_path, MY_KEY=CANARY)
        assert line.startswith("cappy gateway: ")
        assert_names(line, "best of 8", upstream, "aaaaaaaaaaaa")
        assert "(calibrated to rougeL; picks by the score alone)" in line
        answers: list[httpx.Response] = []
        request = threading.Thread(target=lambda: answers.append(ask(url)))
        request.start()
        wait_until(lambda: model.asked, "a request to the LLM", seconds=10, pause=0.01)
        process.send_signal(signal.SIGTERM)
        place = f"{url.removesuffix('/v1')}/ready"
        wait_until(lambda: answers or httpx.get(place).status_code != 200, "a gateway that is not ready", pause=0.01)
        ready = httpx.get(place)
        assert (ready.status_code, "shutting down" in ready.json()["reason"]) == (503, True)
        request.join(20)
        _, log = process.communicate(timeout=20)
    assert [answer.status_code for answer in answers] == [200]
    assert answers[0].headers["x-cappy-calibrated"] == "true"
    assert process.returncode == 0
    assert model.keys == {CANARY}
    assert CANARY not in log + line
    assert "Traceback" not in log
    assert (tmp_path / "log/answers/manifest.json").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--upstream", "localhost"], ["'localhost'", "http://host:port/v1"]),
        (["--upstream", "http://u:p@h/v1"], ["http://…@h/v1", "password"]),
        (["--upstream", "http://h/v1", "--key-variable", "NOT_SET"], ["NOT_SET is not set", "http://h/v1"]),
        (["--upstream", "http://h/v1", "--escalate-to", "http://g/v1"], ["--floor", "--escalate-to"]),
        (
            ["--upstream", "http://h/v1", "--scorer", "http://g", "--scorer-key-variable", "NOT_SET"],
            ["NOT_SET is not set", "http://g"],
        ),
        (
            ["--upstream", "http://h/v1", "--scorer", "builtin:tiny", "--scorer-key-variable", "X"],
            ["--scorer-key-variable", "--scorer http://host:port"],
        ),
        (["--upstream", "http://h/v1", "--max-cost", "1"], ["--max-cost", "--price-input", "--price-output"]),
        (["--upstream", "http://h/v1", "--floor", "0.9", "--threshold", "0.5"], ["--floor 0.9", "--threshold 0.5"]),
        (["--upstream", "http://h/v1", "--scorer", "http://127.0.0.1:9"], ["http://127.0.0.1:9: ", "cappy serve"]),
        (["--upstream", "http://h/v1", "--scorer", "builtin:tiny", "--calibration", "."], [".: ", "calibration.json"]),
    ],
)
def test_what_a_person_can_mend_is_one_line(
    words: list[str],
    named: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from cappy.cli import main

    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            main(["gateway", *words, "--port", "0"])
    finally:
        signal.signal(signal.SIGTERM, before)
    actual = capsys.readouterr().err
    assert ended.value.code == 1
    assert_names(actual, "cappy gateway: ", *named)
    assert actual.count("\n") == 1


def test_the_builtin_scorer_scores_as_it_does_alone_and_has_no_calibration() -> None:
    from cappy.scoring import Scorer

    result = load("builtin")
    pairs = [("Sort: pear fig", "fig pear"), ("Sort: pear fig", "pear fig")]
    assert asyncio.run(result(pairs)) == Scorer.load("builtin:tiny").score(pairs)
    assert result.calibration is None
    assert result.version() == Scorer.load("builtin:tiny").version


async def close(result: Scoring) -> None:
    await result.close()


def test_scores_of_a_running_service_are_asked_over_http(scorer: str) -> None:
    with asyncio.Runner() as loop:
        result = load(scorer)
        pairs = [("a", "x" * length) for length in range(1500)]
        assert loop.run(result(pairs)) == [float(len(response)) for _, response in pairs]
        assert result.version() == "a" * 12
        loop.run(close(result))


def test_a5_logits_of_a_running_service_come_with_its_scores(scorer: str) -> None:
    with asyncio.Runner() as loop:
        result = load(scorer)
        assert loop.run(result.score_with_logits([("a", "xy"), ("a", "x")])) == [(2.0, 20.0), (1.0, 10.0)]
        loop.run(close(result))


def test_a_service_that_wants_a_key_is_given_the_one_that_the_flag_names() -> None:
    with scoring_service(CANARY) as address, asyncio.Runner() as loop:
        result = load(address, key=CANARY)
        assert loop.run(result([("a", "xyz")])) == [3.0]
        loop.run(close(result))
        for key in ("", "another-key"):
            with raises_naming(ConfigError, address, "key", "--scorer-key-variable"):
                load(address, key=key)


def test_a_service_that_does_not_score_is_reported_with_its_remedy() -> None:
    class Broken(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            data = b'{"scores": [1.0], "version": "v"}' if answers.pop(0) else b"{}"
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    answers = [True, False, True, False]
    with handled_by(Broken) as url, asyncio.Runner() as loop:
        result = load(url)
        with raises_naming(GatewayError, "scorer", "does not answer", "cappy serve") as error:
            loop.run(result([("a", "b")]))
        assert error.value.status == 503
        with raises_naming(GatewayError, "scorer", "finite numbers") as error:
            loop.run(result([("a", "b"), ("a", "c")]))
        assert error.value.status == 500
        loop.run(close(result))
        with raises_naming(ConfigError, url, "no scorer", "cappy serve"):
            load(url)
