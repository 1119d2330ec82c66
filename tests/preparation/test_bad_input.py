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

from cappy.errors import CappyError, ConfigError, FolderError, RecordError
from cappy.preparation.step import PreparationConfig, run
from cappy.records import Instance, write

GOOD = {"instruction": "Add.", "reference": "1"}
OBJECT = 'write one object per line: {"instruction": "...", "reference": "..."}'
PROMPT = "give the prompt under that name, or say which column it is: --columns instruction=COLUMN"
SHORTER = "shorten it, or raise --max-characters (of preparation)"
LABEL = "give how correct the response is, from 0 to 1, or true or false"
ANSWER = "give at least one accepted answer as reference or references, or --columns reference=COLUMN"

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
    ("row", "message"),
    [
        (
            {"prompt": "Add.", "reference": "1"},
            f"has no field instruction, fields found: 'prompt, reference'; {PROMPT}",
        ),
        ({}, f"has no field instruction, fields found: 'none'; {PROMPT}"),
        ({"instruction": 5, "reference": "1"}, "instruction must be a text, got 5; put it in quotes"),
        ({"instruction": None, "reference": "1"}, "instruction is empty, got None; give it a text"),
        ({"instruction": " \n", "reference": "1"}, "instruction is empty, got ' \\n'; give it a text"),
        ({"instruction": "Add."}, f"has no reference, fields found: 'instruction'; {ANSWER}"),
        ({"instruction": "Add.", "reference": None}, f"reference holds no text, got None; {ANSWER}"),
        ({"instruction": "Add.", "references": []}, f"references holds no text, got []; {ANSWER}"),
        ({"instruction": "Add.", "references": ["", " "]}, f"references holds no text, got ['', ' ']; {ANSWER}"),
        ({"instruction": "Add.", "references": 5}, "references must be a text or a list of texts, got 5"),
        ({"instruction": "Add.", "references": ["1", 2]}, "references[1] must be a text, got 2; put it in quotes"),
        ({**GOOD, "id": [1]}, "id must be a text, got [1]; put it in quotes"),
        ({**GOOD, "id": True}, "id must be a text, got True; put it in quotes"),
        ({**GOOD, "task": {}}, "task must be a text, got {}; put it in quotes"),
        ({**GOOD, "original_task": "no"}, "original_task must be true or false, got 'no'"),
        ({**GOOD, "split": "dev"}, "split must be one of train, validation, test, got 'dev'; rename it"),
        (
            {**GOOD, "choices": ["1"]},
            "choices are not a choice, got ['1']; give at least two different texts, none of them blank",
        ),
        (
            {**GOOD, "choices": ["1", "1"]},
            "choices are not a choice, got ['1', '1']; give at least two different texts, none of them blank",
        ),
        (
            {**GOOD, "choices": ["one", "two"]},
            "no reference is among the choices, got ['1'] and ['one', 'two']; spell one of them as a choice is spelt",
        ),
        (
            {**GOOD, "choices": ["1", " "]},
            "choices are not a choice, got ['1', ' ']; give at least two different texts, none of them blank",
        ),
        ({**GOOD, "responses": []}, "responses holds no text, got []; leave it out where there are none"),
        ({**GOOD, "responses": 5}, "responses must be a text or a list of texts, got 5"),
        (
            {**GOOD, "responses": ["a", "x" * 100_000]},
            f"responses[1] has 100,000 characters, the limit is 20,000; {SHORTER}",
        ),
        (
            {**GOOD, "candidates": [{"system": "m", "text": "x" * 20_001}]},
            f"candidates[0]: text has 20,001 characters, the limit is 20,000; {SHORTER}",
        ),
        (
            {**GOOD, "candidates": "a"},
            "candidates must be a list of objects, got 'a'; leave it out where there are none",
        ),
        (
            {**GOOD, "candidates": ["a"]},
            "candidates[0] must be an object, got 'a'; plain texts belong under responses",
        ),
        (
            {**GOOD, "candidates": [{"system": "m"}]},
            "candidates[0]: has no text, fields found: 'system'; give the response as text",
        ),
        (
            {**GOOD, "candidates": [{"text": "a", "logprob_sum": float("nan")}]},
            "candidates[0]: logprob_sum must be a finite number, got nan",
        ),
        (
            {**GOOD, "candidates": [{"text": "a", "num_tokens": 2**31}]},
            "candidates[0]: num_tokens must be a whole number of 32 bits, got 2147483648",
        ),
        (
            {**GOOD, "candidates": []},
            "candidates must be a list of objects, got []; leave it out where there are none",
        ),
        (
            {**GOOD, "candidates": [{"text": "a", "label": float("nan")}]},
            f"candidates[0]: label is no label, got nan; {LABEL}",
        ),
        ({**GOOD, "candidates": [{"text": "a", "label": 1.5}]}, f"candidates[0]: label is no label, got 1.5; {LABEL}"),
        ({**GOOD, "candidates": [{"text": "a", "label": "x"}]}, f"candidates[0]: label is no label, got 'x'; {LABEL}"),
        ({**GOOD, "responses": ["a", "b"], "labels": [1, -0.1]}, f"labels[1] is no label, got -0.1; {LABEL}"),
        (
            {**GOOD, "responses": ["a", "b"], "labels": [1]},
            "has 2 responses and 1 labels; give one label for each response, in order",
        ),
        (
            {"instruction": "Add.", "responses": ["a"]},
            f"has no reference, fields found: 'instruction, responses'; {ANSWER}",
        ),
        ({"instruction": "a\0b", "reference": "1"}, "instruction holds a NUL (character 2); delete it"),
        (
            {"instruction": "ab\ud800", "reference": "1"},
            "instruction holds half a character ('\\ud800', character 3); delete it or write the whole one",
        ),
        (
            {**GOOD, "candidates": [{"system": "\udc00", "text": "a"}]},
            "candidates[0]: system holds half a character ('\\udc00', character 1); delete it or write the whole one",
        ),
        ([1], f"must be a JSON object, got [1]; {OBJECT}"),
        ("text", f"must be a JSON object, got 'text'; {OBJECT}"),
    ],
)
def test_a_bad_row_is_named_by_line_field_and_value(refuse: Refuse, row: Any, message: str) -> None:
    Path("in.jsonl").write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(row)}\n")
    assert refuse("in.jsonl") == f"in.jsonl:3: {message}"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{'a': 1}", "in.jsonl:1: is not JSON (Expecting property name enclosed in double quotes: line 1 column 2"),
        (b"instruction\treference", "in.jsonl:1: is not JSON (Expecting value: line 1 column 1 (char 0)), got 'inst"),
        (b"[" * 100_000, "in.jsonl:1: is not JSON (maximum recursion depth exceeded"),
        (b'\n{"instruction": "\xe9"}', "in.jsonl:2: is not UTF-8 (byte 18 of the line); save it as UTF-8"),
        ("{}".encode("utf-16-le"), "in.jsonl: is UTF-16LE without the mark at its beginning; save it as UTF-8: iconv"),
        (
            b"",
            "in.jsonl: holds no instances; give at least one row with instruction and reference",
        ),
        (b"\xef\xbb\xbf\n \n", "in.jsonl: holds no instances; give at least one row with instruction and reference"),
    ],
)
def test_what_is_no_json_lines_is_named_by_line(refuse: Refuse, raw: bytes, message: str) -> None:
    Path("in.jsonl").write_bytes(raw)
    assert refuse("in.jsonl").startswith(message)


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_a_truncated_archive_is_named_with_its_line(refuse: Refuse, pack: Callable[[bytes], bytes]) -> None:
    rng = random.Random(0)
    lines = [json.dumps({"instruction": rng.randbytes(40).hex(), "reference": "r"}) for _ in range(5_000)]
    packed = pack("\n".join(lines).encode())
    Path("in.jsonl.gz").write_bytes(packed[: len(packed) * 2 // 3])
    text = refuse("in.jsonl.gz")
    line = int(text.split(":")[1])
    assert 1_000 < line < 5_000
    assert text == (
        f"in.jsonl.gz:{line}: the compressed file is truncated or damaged "
        "(Compressed file ended before the end-of-stream marker was reached); fetch or pack it again"
    )


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
    monkeypatch.setattr("cappy.preparation.lines.MAX_LINE_BYTES", 1_000)
    Path("in.jsonl").write_bytes(b"\n" + b" " * 1_001)
    assert refuse("in.jsonl") == "in.jsonl:2: the line is longer than 1,000 bytes; write one row per line"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,reference\na,b\n", "in.csv:2: has no field instruction, fields found: 'prompt, reference'; "),
        ("instruction,reference\n\na,\n", f"in.csv:3: reference holds no text, got None; {ANSWER}"),
        ("instruction,reference\na,b\n,b\n", "in.csv:3: instruction is empty, got None; give it a text"),
        (
            'instruction,reference\n"a\nb",1\nHello, world,1\n',
            "in.csv:4: has 3 cells, the header has 2; quote cells that hold commas, quotes or line ends",
        ),
        (
            "instruction,reference,reference\n",
            "in.csv:1: the header names 'reference' twice; rename one of the columns",
        ),
        ('instruction,reference\na,b\n"a,b\n', "in.csv:3: is not CSV (unexpected end of data); mend its quotes"),
        ("instruction,reference\n", "in.csv: holds no instances; give at least one row with instruction and reference"),
        ("", "in.csv: holds no instances; give at least one row with instruction and reference"),
    ],
)
def test_a_bad_csv_file_is_named_by_the_line_where_the_row_begins(refuse: Refuse, text: str, message: str) -> None:
    Path("in.csv").write_text(text)
    assert refuse("in.csv").startswith(message)


def test_a_csv_file_that_is_not_utf_8_is_named_by_line(refuse: Refuse) -> None:
    Path("in.csv").write_bytes(b"instruction,reference\nna\xefve,b\n")
    assert refuse("in.csv") == (
        "in.csv:2: is not UTF-8 (byte 3 of the line); save it as UTF-8: iconv -f WINDOWS-1252 -t UTF-8 in.csv > NEW"
    )


def test_a_bad_parquet_file_is_named_by_row(refuse: Refuse) -> None:
    pq.write_table(pa.table({"instruction": ["a", None], "reference": ["1", "2"]}), "in.parquet")
    assert refuse("in.parquet") == "in.parquet: row 2: instruction is empty, got None; give it a text"
    Path("in.parquet").write_bytes(b"PAR1 but no more")
    assert refuse("in.parquet").startswith("in.parquet: row 1: cannot be read as Parquet (")
    Path("in.parquet").write_bytes(b"")
    assert refuse("in.parquet").startswith("in.parquet: row 1: cannot be read as Parquet (")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"id": "a"}, {"id": "b"}, {"id": "b"}, {"id": "a"}],
            "in.jsonl:3: id 'b' stands at in.jsonl:2 already; give every row its own id",
        ),
        ([{"id": 1}, {"id": "1"}], "in.jsonl:2: id '1' stands at in.jsonl:1 already; give every row its own id"),
        (
            [{"id": "a"}, {}],
            "in.jsonl:2: gives no id, in.jsonl:1 gives one; give every row its id, or none",
        ),
        ([{}, {"id": "a"}], "in.jsonl:2: gives id, in.jsonl:1 gives none; give every row its id, or none"),
        (
            [{"split": "test"}, {}],
            "in.jsonl:2: gives no split, in.jsonl:1 gives one; give every row its split, or none",
        ),
        (
            [{}, {}, {"split": "test"}],
            "in.jsonl:3: gives split, in.jsonl:1 gives none; give every row its split, or none",
        ),
        (
            [
                {"split": "train", "instruction": "Add one."},
                {"split": "test"},
                {"split": "test", "instruction": " ADD  one."},
            ],
            (
                "in.jsonl:3: instruction ' ADD  one.' is in test, at in.jsonl:1 in train; "
                "delete one of the two, or leave out every split to have them drawn"
            ),
        ),
        (
            [{"split": "train", "group_id": "g"}, {"split": "validation", "group_id": "g"}],
            (
                "in.jsonl:2: group_id 'g' is in validation, at in.jsonl:1 in train; "
                "delete one of the two, or leave out every split to have them drawn"
            ),
        ),
        (
            [{}, {}],
            (
                "in.jsonl: 2 group(s) cannot fill 3 splits; "
                "give at least 3 different instructions, or set --test 0 and --validation 0"
            ),
        ),
    ],
)
def test_rows_that_do_not_fit_together_are_named_by_both_lines(
    refuse: Refuse, rows: list[dict[str, Any]], message: str
) -> None:
    given = [{"instruction": f"Add {n}.", "reference": "1", **row} for n, row in enumerate(rows)]
    Path("in.jsonl").write_text("\n".join(map(json.dumps, given)))
    kind = ConfigError if "group(s)" in message else RecordError
    assert refuse("in.jsonl", kind) == message


def test_the_limit_of_characters_is_a_setting(refuse: Refuse) -> None:
    Path("in.jsonl").write_text(json.dumps({"instruction": "12345", "reference": "1"}))
    message = f"in.jsonl:1: instruction has 5 characters, the limit is 4; {SHORTER}"
    assert refuse("in.jsonl", max_characters=4) == message


def test_a_source_that_does_not_exist_is_named(refuse: Refuse) -> None:
    known = "builtin, a JSON Lines, CSV or Parquet file, a BIG-bench task, a folder of records or hub:org/name"
    assert refuse("in.jsonl", ConfigError) == f"in.jsonl: no such file or folder; --source is {known}"


def test_a_folder_must_be_finished_and_hold_instances(refuse: Refuse) -> None:
    Path("folder").mkdir()
    remedy = "name a file in it, or run the step that writes it again"
    assert (
        refuse("folder", FolderError)
        == f"folder: is a folder without manifest.json, of its own or in folders of it; {remedy}"
    )
    write("folder", [], step="annotation")
    assert refuse("folder", FolderError) == "folder: holds no instances (written by annotation); choose another"


def test_a_folder_whose_splits_share_a_prompt_is_refused(refuse: Refuse) -> None:
    given = [
        Instance(instance_id="a", instruction="Add.", references=("1",), split="train"),
        Instance(instance_id="b", instruction="add.", references=("1",), split="test"),
    ]
    write("folder", given)
    assert refuse("folder").startswith("folder: instance 'b': instruction 'add.' is in test, at folder: instance 'a'")


def test_a_bad_last_row_leaves_no_unfinished_work_either(refuse: Refuse) -> None:
    Path("in.jsonl").write_text("\n".join([*(json.dumps({**GOOD, "id": n}) for n in range(50)), "{}"]))
    assert refuse("in.jsonl", part_rows=1).startswith("in.jsonl:51: has no field instruction")
    assert not Path("work").exists()
