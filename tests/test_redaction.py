"""Secrets are taken out of texts by their value, whatever form they take and wherever a text is cut."""

import base64
import html
import json
import logging
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cappy import redaction
from cappy.errors import ConfigError, quote
from cappy.redaction import has_secret, one_line, redact, redact_address, register_address, register_secret, truncate

VARIABLES = (
    *("OPENAI_API_KEY", "MY_LLM_KEY", "CAPPY_WEBHOOK_SECRET", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_CLIENT_SECRET", "AZURE_STORAGE_ACCESS_KEY", "HF_TOKEN"),
    *("HUGGING_FACE_HUB_TOKEN", "GOOGLE_API_KEY", "KUBE_TOKEN", "AZURE_STORAGE_CONNECTION_STRING"),
)


def _as_dotnet(text: str) -> str:
    marks = (('\\"', "22"), ("&", "26"), ("'", "27"), ("+", "2B"), ("<", "3C"))
    for mark, code in marks:
        text = text.replace(mark, f"\\u00{code}")
    return text


CANARY = "ca/na?ry+#7f3é\"'&<"


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_registered", set())


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize(
    "form",
    [
        str,
        json.dumps,
        repr,
        quote,
        urllib.parse.quote_plus,
        html.escape,
        lambda text: html.escape(text).replace("&quot;", "&#34;").replace("&#x27;", "&#39;"),
        lambda text: json.dumps(text).replace("/", "\\/"),
        lambda text: json.dumps(json.dumps({"error": text})),
        lambda text: json.dumps(text).replace("&", "\\u0026").replace("<", "\\u003c"),
        lambda text: _as_dotnet(json.dumps(text)[1:-1]),
        lambda text: (
            urllib.parse.quote(text, safe="").replace("%2F", "%2f").replace("%2B", "%2b").replace("%3F", "%3f").lower()
        ),
        lambda text: urllib.parse.quote(text, safe=""),
        lambda text: repr(text.encode()),
        lambda text: base64.b64encode(text.encode()).decode(),
        lambda text: base64.urlsafe_b64encode(text.encode()).decode().rstrip("="),
    ],
)
def test_a_secret_of_the_environment_stands_in_no_form(
    monkeypatch: pytest.MonkeyPatch, variable: str, form: object
) -> None:
    monkeypatch.setenv(variable, f"{CANARY}\n")
    text = f"before {form(CANARY)} after"  # type: ignore[operator]
    result = redact(text)
    assert "***" in result
    assert "7f3" not in result
    assert CANARY not in result
    monkeypatch.delenv(variable)
    assert redact(text) == text, "it is not a secret any more"


def test_lists_headers_files_and_addresses_hold_secrets_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("of-a-file\n")
    (tmp_path / "account.json").write_text(json.dumps({"private_key": "-----BEGIN\nline-of-a-key\n", "type": "robot"}))
    monkeypatch.setenv("CAPPY_API_KEYS", "first-of-keys, second-of-keys")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20of-otel,x-team=of-team")
    monkeypatch.setenv("OTHER_API_KEY_FILE", str(tmp_path / "key"))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "account.json"))
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "AccountName=me;AccountKey=of-azure==;EndpointSuffix=w.net")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:of-proxy@proxy:3128")
    monkeypatch.setenv("DATABASE", "postgresql://me:of/data@base@host/db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://host/?access_token=of-mlflow&x=1")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "of-basic")
    basic = base64.b64encode(b"me:of-basic").decode()
    secrets = [
        *("first-of-keys", "second-of-keys", "of-otel", "of-team", "of-a-file", "line-of-a-key"),
        *("of-azure==", "of-proxy", "of/data@base", "of-mlflow", "of-basic", basic),
    ]
    for secret in secrets:
        assert redact(f"is {secret}.") == "is ***."
    assert redact("w.net robot me host") == "w.net robot me host"


def test_a_file_whose_secret_is_rotated_is_read_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("first-token")
    monkeypatch.setenv("SOME_TOKEN_FILE", str(path))
    assert redact("first-token next-token-1") == "*** next-token-1"
    path.write_text("next-token-1")
    assert redact("first-token next-token-1") == "first-token ***"


def test_what_is_short_or_an_ordinary_word_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "abc", "none", "token", "password", "required"):
        monkeypatch.setenv("SOME_PASSWORD", value)
        assert redact("abc none token password required") == "abc none token password required"


@given(padding=st.integers(0, 80), limit=st.integers(1, 120), tail=st.integers(0, 40))
def test_no_cut_leaves_the_beginning_of_a_secret(padding: int, limit: int, tail: int) -> None:
    key = "0123456789abcdefghij"
    text = "x" * padding + key + "y" * tail
    for result in (truncate(text, limit, key), one_line(text, limit, key), quote(text, limit, keys=[key])):
        assert "0" not in result
        assert len(result) <= limit


@pytest.mark.parametrize("offset", range(-45, 5))
def test_the_end_of_the_window_leaves_none_either(offset: int) -> None:
    key = "0123456789abcdefghij"
    assert "0" not in truncate("x" * (redaction.WINDOW + offset) + key, 10**9, key)
    assert "0" not in truncate((key + "\n") * 100_000, 10**9, key)


@pytest.mark.parametrize(
    ("address", "shown_as"),
    [
        ("http://h:5000/x", "http://h:5000/x"),
        ("http://u:pw@h:5000/x?a=1", "http://…@h:5000/x?a=1"),
        ("postgresql://u:p@ss/w0rd@host/db", "postgresql://…@host/db"),
        ("postgresql://u:p?s#s@host/db", "postgresql://…@host/db"),
        ("https://h/?token=abcdefg&x=1", "https://h/?token=***&x=1"),
        ("https://h/?x=1&api_key=a@b", "https://…"),
        ("https://h/#access_token=abcdefg", "https://h/#access_token=***"),
        ("https://u:p@h/?sig=abcdefg", "https://…@h/?sig=***"),
        ("https://token-as-user@h/x", "https://…@h/x"),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
        (".cappy/mlflow", ".cappy/mlflow"),
    ],
)
def test_an_address_is_shown_without_its_secrets(address: str, shown_as: str) -> None:
    assert redact_address(address) == shown_as
    assert has_secret(address) == (shown_as != address)


def test_a_users_name_of_a_database_is_no_secret_but_is_not_shown() -> None:
    assert not has_secret("postgresql+psycopg2://anna@host/db")
    assert redact_address("postgresql+psycopg2://anna@host/db") == "postgresql+psycopg2://…@host/db"


@given(st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S"]), min_size=8, max_size=20))
def test_no_password_of_an_address_is_shown(password: str) -> None:
    whole = f"A{password}Z1"
    address = f"postgresql://user:{whole}@host/db"
    assert whole not in redact_address(address)
    before = set(redaction._registered)
    register_address(address)
    assert whole not in redact(f"cannot connect: {whole}")
    redaction._registered.clear()
    redaction._registered.update(before)


def test_what_was_registered_is_taken_out_of_errors_logs_and_tracebacks(caplog: pytest.LogCaptureFixture) -> None:
    register_secret("of-a-client", user="me")
    assert str(ConfigError("x: of-a-client is wrong")) == "x: *** is wrong"
    assert redact(base64.b64encode(b"me:of-a-client").decode()) == "***"
    former = logging.getLogRecordFactory()
    hooks = (sys.excepthook, threading.excepthook, sys.unraisablehook)
    try:
        redaction.redact_output()
        try:
            raise ValueError("of-a-client")
        except ValueError:
            logging.getLogger("x").exception("it was %s", "of-a-client")
    finally:
        logging.setLogRecordFactory(former)
        sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
    assert "it was ***" in caplog.text
    assert "ValueError: ***" in caplog.text
    assert "of-a-client" not in caplog.text


def test_the_traceback_of_a_defect_of_the_command_holds_no_secret(tmp_path: Path) -> None:
    code = (
        "import os, threading, cappy.cli as cli\n"
        "def fail(*_, **__):\n"
        "    raise ValueError('sk-canary-9 ' + os.environ['SOME_KEY'])\n"
        "cli.app.registered_commands[-1].callback = fail\n"
        "cli.app = fail\n"
        "cli.redact_output()\n"
        "class Failing:\n"
        "    __del__ = fail\n"
        "Failing()\n"
        "thread = threading.Thread(target=fail); thread.start(); thread.join()\n"
        "cli.main([])\n"
    )
    environment = {"SOME_KEY": "sk-canary-9", "PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.count("ValueError: *** ***") == 3
    assert "sk-canary" not in result.stderr
    assert "Traceback" in result.stderr


def test_redacting_costs_little() -> None:
    import timeit

    assert timeit.timeit(lambda: redact("a line of a log"), number=100) / 100 < 0.05
    assert timeit.timeit(lambda: redact("x" * 65_536), number=10) / 10 < 2


@pytest.mark.parametrize("length", range(4, 20))
def test_a_text_that_breaks_off_within_a_secret_does_not_show_its_beginning(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the body of a server that hangs up in the middle of it does."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary-0123456789")
    text = f"Incorrect API key provided: {'sk-canary-0123456789'[:length]}"
    assert truncate(text, 200) == "Incorrect API key provided: ***"
    assert "sk-c" not in quote(text, 200)
    assert "sk-c" not in one_line(text, 200)


def test_a_text_that_ends_like_no_secret_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary-0123456789")
    for text in ("sk-", "a task", "ask-canine", "sk-canary was here", ""):
        assert truncate(text, 200) == text
