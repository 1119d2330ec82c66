"""JSON Lines in and out, without a process."""

import io
import json
import subprocess
import sys
import tracemalloc

import pytest
from wording import assert_names, raises_naming

from cappy.cli.scoring import lines, write_line
from cappy.errors import RecordError


def test_blank_lines_are_left_out_and_lines_keep_their_numbers() -> None:
    result = list(lines(io.BytesIO(b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": 2}'), "in.jsonl"))
    assert [(line.where, line.value) for line in result] == [("in.jsonl:1", {"a": 1}), ("in.jsonl:4", {"a": 2})]


@pytest.mark.parametrize(
    ("raw", "names"),
    [
        (b'{"a"', ("not JSON",)),
        (b"[1]", ("object", "got [1]")),
        (b'{"a": "\xff"}', ("not UTF-8", "byte 8")),
        (b'{"a": NaN}', ("not JSON", "NaN")),
        (b"[" * 100_000, ("not JSON",)),
    ],
)
def test_a_line_that_is_no_object_is_named_in_one_line(raw: bytes, names: tuple[str, ...]) -> None:
    with raises_naming(RecordError, "in.jsonl:1: ", *names) as error:
        list(lines(io.BytesIO(raw), "in.jsonl"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("raw", "names"),
    [
        (b'{"b": ""}', ("field 'a'", "fields found: 'b'")),
        (b'{"a": 5}', ("a must be", "got 5")),
        (b'{"a": null}', ("a must be", "got None")),
        (b'{"a": "\\ud800"}', ("a contains", "unpaired surrogate")),
    ],
)
def test_a_field_that_is_no_text_is_named_in_one_line(raw: bytes, names: tuple[str, ...]) -> None:
    (line,) = lines(io.BytesIO(raw), "-")
    with raises_naming(RecordError, "stdin:1: ", *names) as error:
        line.text("a")
    str(error.value).encode()


@pytest.mark.parametrize(
    ("raw", "names"),
    [
        (b'{"a": []}', ("a must be a list", "got []")),
        (b'{"a": "b"}', ("a must be a list", "got 'b'")),
        (b'{"a": ["b", 2]}', ("a[1] must be", "got 2")),
    ],
)
def test_a_field_that_is_no_list_of_texts_is_named_in_one_line(raw: bytes, names: tuple[str, ...]) -> None:
    (line,) = lines(io.BytesIO(raw), "-")
    with raises_naming(RecordError, "stdin:1: ", *names):
        line.texts("a")


def test_what_is_written_is_one_line_of_json_that_reads_back_equal(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    values: list[dict[str, object]] = [{"a": "猫\n\u2028", "b": 0.1}, {"a": "\ud800"}]
    for value in values:
        write_line(value)
    written = capsysbinary.readouterr().out
    assert written.count(b"\n") == 2
    assert [json.loads(line) for line in written.split(b"\n")[:2]] == values
    assert "猫".encode() in written


def test_memory_does_not_grow_with_the_number_of_lines() -> None:
    class Endless(io.RawIOBase):
        left = 20_000

        def readline(self, size: int | None = -1, /) -> bytes:
            self.left -= 1
            return b'{"instruction": "%s"}\n' % (b"x" * 1000) if self.left else b""

    tracemalloc.start()
    for line in lines(Endless(), "big"):  # type: ignore[arg-type]
        line.text("instruction")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000


def test_a_line_without_an_end_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cappy.cli.scoring.MAX_LINE_BYTES", 1000)
    whole = b'{"a": "%s"}\n' % (b"x" * 900)
    endless = io.BytesIO(whole + b"x" * 10_000)
    result = lines(endless, "in.jsonl")
    assert len(next(result).text("a")) == 900
    with pytest.raises(RecordError, match=r"in\.jsonl:2: .* 1,000 bytes"):
        next(result)
    assert endless.tell() < 3000


READING = (
    "import sys\nfrom cappy.cli.scoring import open_source, reserve_stdin\nfrom cappy.errors import ConfigError\n"
    "with reserve_stdin():\n"
    "    try:\n        with open_source(sys.argv[1]) as file:\n            sys.stdout.write(file.read().decode())\n"
    "    except ConfigError as error:\n        sys.exit(str(error))\n"
)


@pytest.mark.parametrize("name", ["-", "/dev/stdin", "/dev/fd/0"])
def test_standard_input_is_read_under_each_of_its_names(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", READING, name], input="{}\n", capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("{}\n", "", 0)


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_a_closed_standard_input_is_one_line(name: str) -> None:
    words = ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, "-c", READING, name]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert_names(done.stderr, f"{name}: ", "closed", "--source FILE")
