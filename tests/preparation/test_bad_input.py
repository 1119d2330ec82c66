"""Every bad input is refused in one line that names file, line, field, value and remedy, and leaves nothing behind."""

import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from wording import assert_names

from cappy.errors import CappyError, ConfigError, FolderError, RecordError
from cappy.preparation.step import PreparationConfig, run
from cappy.records import Instance, write

GOOD = {"instruction": "Add.", "reference": "1"}
PROMPT = "--columns instruction=COLUMN"
SHORTER = "--max-characters"
LABEL = "from 0 to 1"
ANSWER = "--columns reference=COLUMN"
ONE_ROW = "at least one row"
NOT_A_CHOICE = "at least two different texts"

Refuse = Callable[..., str]


@pytest.fixture
def refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """refuse(source, kind, **settings): the error's text, once it is known that nothing was published."""
    monkeypatch.chdir(tmp_path)

    def refused(source: str, kind: type[CappyError] = RecordError, **settings: Any) -> str:
        with pytest.raises(kind) as error:
            run(PreparationConfig(source=source, target=Path("target"), work=Path("work"), **settings))
        assert not Path("target").exists()
        text = str(error.value)
        assert "\n" not in text
        text.encode()
        return text

    return refused


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"prompt": "Add.", "reference": "1"}, ("no field instruction", "'prompt, reference'", PROMPT)),
        ({}, ("no field instruction", "'none'", PROMPT)),
        ({"instruction": 5, "reference": "1"}, ("instruction must be a string", "got 5", "quotes")),
        ({"instruction": None, "reference": "1"}, ("instruction is empty", "got None")),
        ({"instruction": " \n", "reference": "1"}, ("instruction is empty", "got ' \\n'")),
        ({"instruction": "Add."}, ("no reference", "'instruction'", ANSWER)),
        ({"instruction": "Add.", "reference": None}, ("reference is empty", "got None", ANSWER)),
        ({"instruction": "Add.", "references": []}, ("references is empty", "got []", ANSWER)),
        ({"instruction": "Add.", "references": ["", " "]}, ("references is empty", "got ['', ' ']", ANSWER)),
        ({"instruction": "Add.", "references": 5}, ("references", "a string or a list", "got 5")),
        ({"instruction": "Add.", "references": ["1", 2]}, ("references[1] must be a string", "got 2", "quotes")),
        ({**GOOD, "id": [1]}, ("id must be a string", "got [1]")),
        ({**GOOD, "id": True}, ("id must be a string", "got True")),
        ({**GOOD, "task": {}}, ("task must be a string", "got {}")),
        ({**GOOD, "original_task": "no"}, ("original_task", "true or false", "got 'no'")),
        ({**GOOD, "split": "dev"}, ("split", "train, validation, test", "got 'dev'")),
        ({**GOOD, "choices": ["1"]}, ("choices", "got ['1']", NOT_A_CHOICE)),
        ({**GOOD, "choices": ["1", "1"]}, ("choices", "got ['1', '1']", NOT_A_CHOICE)),
        ({**GOOD, "choices": ["one", "two"]}, ("reference", "choices", "['1']", "['one', 'two']")),
        ({**GOOD, "choices": ["1", " "]}, ("choices", "got ['1', ' ']", NOT_A_CHOICE)),
        ({**GOOD, "responses": []}, ("responses is empty", "got []", "leave it out")),
        ({**GOOD, "responses": 5}, ("responses", "a string or a list", "got 5")),
        ({**GOOD, "responses": ["a", "x" * 100_000]}, ("responses[1]", "100,000", "20,000", SHORTER)),
        (
            {**GOOD, "candidates": [{"system": "m", "text": "x" * 20_001}]},
            ("candidates[0]: text", "20,001", "20,000", SHORTER),
        ),
        ({**GOOD, "candidates": "a"}, ("candidates", "list of objects", "got 'a'", "leave it out")),
        ({**GOOD, "candidates": ["a"]}, ("candidates[0]", "object", "got 'a'", "responses")),
        ({**GOOD, "candidates": [{"system": "m"}]}, ("candidates[0]: has no text", "'system'")),
        (
            {**GOOD, "candidates": [{"text": "a", "logprob_sum": float("nan")}]},
            ("candidates[0]: logprob_sum", "finite", "got nan"),
        ),
        (
            {**GOOD, "candidates": [{"text": "a", "num_tokens": 2**31}]},
            ("candidates[0]: num_tokens", "32-bit", "got 2147483648"),
        ),
        ({**GOOD, "candidates": []}, ("candidates", "list of objects", "got []", "leave it out")),
        ({**GOOD, "candidates": [{"text": "a", "label": float("nan")}]}, ("candidates[0]: label", "got nan", LABEL)),
        ({**GOOD, "candidates": [{"text": "a", "label": 1.5}]}, ("candidates[0]: label", "got 1.5", LABEL)),
        ({**GOOD, "candidates": [{"text": "a", "label": "x"}]}, ("candidates[0]: label", "got 'x'", LABEL)),
        ({**GOOD, "responses": ["a", "b"], "labels": [1, -0.1]}, ("labels[1]", "got -0.1", LABEL)),
        ({**GOOD, "responses": ["a", "b"], "labels": [1]}, ("2 responses", "1 labels", "in order")),
        ({"instruction": "Add.", "responses": ["a"]}, ("no reference", "'instruction, responses'", ANSWER)),
        ({"instruction": "a\0b", "reference": "1"}, ("instruction", "NUL", "character 2")),
        ({"instruction": "ab\ud800", "reference": "1"}, ("instruction", "'\\ud800'", "character 3")),
        (
            {**GOOD, "candidates": [{"system": "\udc00", "text": "a"}]},
            ("candidates[0]: system", "'\\udc00'", "character 1"),
        ),
        ([1], ("JSON object", "got [1]", "one object per line")),
        ("text", ("JSON object", "got 'text'", "one object per line")),
    ],
)
def test_a_bad_row_is_named_by_line_field_and_value(refuse: Refuse, row: Any, parts: tuple[str, ...]) -> None:
    Path("in.jsonl").write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(row)}\n")
    text = refuse("in.jsonl")
    assert text.startswith("in.jsonl:3: ")
    assert_names(text, *parts)


@pytest.mark.parametrize(
    ("raw", "parts"),
    [
        (b"{'a': 1}", ("in.jsonl:1: ", "not JSON", "line 1 column 2")),
        (b"instruction\treference", ("in.jsonl:1: ", "not JSON", "char 0", "'instruction")),
        (b"[" * 100_000, ("in.jsonl:1: ", "not JSON", "recursion depth")),
        (b'\n{"instruction": "\xe9"}', ("in.jsonl:2: ", "UTF-8", "byte 18", "iconv")),
        ("{}".encode("utf-16-le"), ("in.jsonl: ", "UTF-16LE", "mark", "iconv -f UTF-16LE -t UTF-8")),
        (b"", ("in.jsonl: ", "no instances", ONE_ROW)),
        (b"\xef\xbb\xbf\n \n", ("in.jsonl: ", "no instances", ONE_ROW)),
    ],
)
def test_what_is_no_json_lines_is_named_by_line(refuse: Refuse, raw: bytes, parts: tuple[str, ...]) -> None:
    Path("in.jsonl").write_bytes(raw)
    assert_names(refuse("in.jsonl"), *parts)


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_a_truncated_archive_is_named_with_its_line(refuse: Refuse, pack: Callable[[bytes], bytes]) -> None:
    rng = random.Random(0)
    lines = [json.dumps({"instruction": rng.randbytes(40).hex(), "reference": "r"}) for _ in range(5_000)]
    packed = pack("\n".join(lines).encode())
    Path("in.jsonl.gz").write_bytes(packed[: len(packed) * 2 // 3])
    text = refuse("in.jsonl.gz")
    line = int(text.split(":")[1])
    assert 1_000 < line < 5_000
    assert_names(text, f"in.jsonl.gz:{line}: ", "truncated", "end-of-stream", "again")


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_a_damaged_archive_is_refused(refuse: Refuse, pack: Callable[[bytes], bytes]) -> None:
    rng = random.Random(0)
    packed = bytearray(pack("\n".join(json.dumps({**GOOD, "x": rng.randbytes(9).hex()}) for _ in range(900)).encode()))
    packed[len(packed) // 2] ^= 0xFF
    Path("in.jsonl.gz").write_bytes(packed)
    assert refuse("in.jsonl.gz").startswith("in.jsonl.gz:")


def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(
    refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cappy.preparation.text_files.MAX_LINE_BYTES", 1_000)
    Path("in.jsonl").write_bytes(b"\n" + b" " * 1_001)
    assert_names(refuse("in.jsonl"), "in.jsonl:2: ", "longer than 1,000 bytes", "one row per line")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("prompt,reference\na,b\n", ("in.csv:2: ", "no field instruction", "'prompt, reference'", PROMPT)),
        ("instruction,reference\n\na,\n", ("in.csv:3: ", "reference is empty", "got None", ANSWER)),
        ("instruction,reference\na,b\n,b\n", ("in.csv:3: ", "instruction is empty", "got None")),
        ('instruction,reference\n"a\nb",1\nHello, world,1\n', ("in.csv:4: ", "3 cells", "header has 2", "quote")),
        ("instruction,reference,reference\n", ("in.csv:1: ", "header", "'reference' twice", "rename")),
        ('instruction,reference\na,b\n"a,b\n', ("in.csv:3: ", "not CSV", "unexpected end of data", "quotes")),
        ("instruction,reference\n", ("in.csv: ", "no instances", ONE_ROW)),
        ("", ("in.csv: ", "no instances", ONE_ROW)),
    ],
)
def test_a_bad_csv_file_is_named_by_the_line_where_the_row_begins(
    refuse: Refuse, text: str, parts: tuple[str, ...]
) -> None:
    Path("in.csv").write_text(text)
    assert_names(refuse("in.csv"), *parts)


def test_a_csv_file_that_is_not_utf_8_is_named_by_line(refuse: Refuse) -> None:
    Path("in.csv").write_bytes(b"instruction,reference\nna\xefve,b\n")
    assert_names(refuse("in.csv"), "in.csv:2: ", "not UTF-8", "byte 3", "iconv -f WINDOWS-1252 -t UTF-8 in.csv > NEW")


def test_a_bad_parquet_file_is_named_by_row(refuse: Refuse) -> None:
    pq.write_table(pa.table({"instruction": ["a", None], "reference": ["1", "2"]}), "in.parquet")
    assert_names(refuse("in.parquet"), "in.parquet: row 2: ", "instruction is empty", "got None")
    for damaged in (b"PAR1 but no more", b""):
        Path("in.parquet").write_bytes(damaged)
        assert_names(refuse("in.parquet"), "in.parquet: row 1: ", "as Parquet")


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        (
            [{"id": "a"}, {"id": "b"}, {"id": "b"}, {"id": "a"}],
            ("in.jsonl:3: ", "id 'b'", "already used at in.jsonl:2"),
        ),
        ([{"id": 1}, {"id": "1"}], ("in.jsonl:2: ", "id '1'", "already used at in.jsonl:1")),
        ([{"id": "a"}, {}], ("in.jsonl:2: id is missing", "present at in.jsonl:1", "or none")),
        ([{}, {"id": "a"}], ("in.jsonl:2: id is present", "missing at in.jsonl:1", "or none")),
        ([{"split": "test"}, {}], ("in.jsonl:2: split is missing", "present at in.jsonl:1", "or none")),
        ([{}, {}, {"split": "test"}], ("in.jsonl:3: split is present", "missing at in.jsonl:1", "or none")),
        (
            [
                {"split": "train", "instruction": "Add one."},
                {"split": "test"},
                {"split": "test", "instruction": " ADD  one."},
            ],
            ("in.jsonl:3: ", "' ADD  one.' is in split test", "in train at in.jsonl:1", "leave out all splits"),
        ),
        (
            [{"split": "train", "group_id": "g"}, {"split": "validation", "group_id": "g"}],
            ("in.jsonl:2: ", "group_id 'g' is in split validation", "in train at in.jsonl:1", "leave out all splits"),
        ),
        ([{}, {}], ("in.jsonl: ", "2 group(s)", "at least 3", "--test 0", "--validation 0")),
    ],
)
def test_rows_that_do_not_fit_together_are_named_by_both_lines(
    refuse: Refuse, rows: list[dict[str, Any]], parts: tuple[str, ...]
) -> None:
    given = [{"instruction": f"Add {n}.", "reference": "1", **row} for n, row in enumerate(rows)]
    Path("in.jsonl").write_text("\n".join(map(json.dumps, given)))
    text = refuse("in.jsonl", ConfigError if "2 group(s)" in parts else RecordError)
    assert text.startswith(parts[0])
    assert_names(text, *parts)


def test_the_limit_of_characters_is_a_setting(refuse: Refuse) -> None:
    Path("in.jsonl").write_text(json.dumps({"instruction": "12345", "reference": "1"}))
    assert_names(refuse("in.jsonl", max_characters=4), "in.jsonl:1: instruction", "5 characters", "limit is 4", SHORTER)


def test_a_source_that_does_not_exist_is_named(refuse: Refuse) -> None:
    known = ("builtin", "JSON Lines", "CSV", "Parquet", "BIG-bench", "folder of records", "hub:org/name")
    assert_names(refuse("in.jsonl", ConfigError), "in.jsonl: no such file", "--source", *known)


def test_a_folder_must_be_finished_and_hold_instances(refuse: Refuse) -> None:
    Path("folder").mkdir()
    assert_names(refuse("folder", FolderError), "folder: ", "manifest.json", "again")
    write("folder", [], step="annotation")
    assert_names(refuse("folder", FolderError), "folder: ", "no instances", "annotation")


def test_a_folder_whose_splits_share_a_prompt_is_refused(refuse: Refuse) -> None:
    given = [
        Instance(instance_id="a", instruction="Add.", references=("1",), split="train"),
        Instance(instance_id="b", instruction="add.", references=("1",), split="test"),
    ]
    write("folder", given)
    assert_names(refuse("folder"), "folder: instance 'b'", "'add.'", "in split test", "folder: instance 'a'")


def test_a_bad_last_row_leaves_no_unfinished_work_either(refuse: Refuse) -> None:
    Path("in.jsonl").write_text("\n".join([*(json.dumps({**GOOD, "id": n}) for n in range(50)), "{}"]))
    assert_names(refuse("in.jsonl", part_rows=1), "in.jsonl:51: ", "no field instruction")
    assert not Path("work").exists()
