"""Files in every format: what is read, what is refused and with what remedy; small ones that are large in memory."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import resource
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from wording import raises_naming

from cappy.errors import RecordError
from cappy.preparation import tables
from cappy.preparation.bigbench import is_task, read_task
from cappy.preparation.files import choose_reader
from cappy.preparation.tables import read_csv, read_parquet
from cappy.preparation.text_files import PIECE_CHARACTERS, read_lines
from cappy.records import Instance, Manifest

Prepare = Callable[..., tuple[Manifest, list[Instance]]]
ROWS = [{"instruction": f"Say é {number}.", "reference": f"{number}, über"} for number in range(12)]
JSON_LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def zipped(data: bytes, name: str = "rows.jsonl", more: Mapping[str, bytes] = MappingProxyType({})) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
        for other, content in more.items():
            archive.writestr(other, content)
    return buffer.getvalue()


def table(mark: str) -> str:
    cells = [("instruction", "reference"), *((row["instruction"], f'"{row["reference"]}"') for row in ROWS)]
    return "".join(f"{one}{mark}{other}\n" for one, other in cells)


def arrow_stream() -> bytes:
    buffer = io.BytesIO()
    data = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(buffer, data.schema) as writer:
        writer.write_table(data, max_chunksize=5)
    return buffer.getvalue()


def feather(compression: str) -> bytes:
    buffer = io.BytesIO()
    pa.feather.write_feather(pa.Table.from_pylist(ROWS), buffer, compression=compression)
    return buffer.getvalue()


def parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), buffer)
    return buffer.getvalue()


UTF8 = JSON_LINES.encode()
FILES = {
    "array.json": json.dumps(ROWS, ensure_ascii=False).encode(),
    "array.jsonl": b"\xef\xbb\xbf \n" + json.dumps(ROWS, indent=2).encode(),
    "pretty.json": "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    "rows.tsv": table("\t").encode(),
    "rows.tab": table("\t").encode(),
    "tabs.csv": table("\t").encode(),
    "semicolons.csv": table(";").encode(),
    "bars.csv": table("|").encode(),
    "rows.CSV": table(",").encode(),
    "rows.jsonl.bz2": bz2.compress(UTF8),
    "rows.jsonl.zip": zipped(UTF8),
    "rows.zip": zipped(UTF8, more={"__MACOSX/._rows.jsonl": b"x"}),
    "rows.csv.zip": zipped(table(";").encode(), "rows.csv"),
    "rows.jsonl.zst": pa.compress(UTF8, codec="zstd", asbytes=True),
    "rows.csv.gz": gzip.compress(table(",").encode("utf-16")),
    "rows.json.xz": lzma.compress(json.dumps(ROWS).encode()),
    "returns.csv": table(",").replace("\n", "\r").encode(),
    "returns.tsv": table("\t").replace("\n", "\r").encode("utf-16"),
    "both-ends.csv": table(",").replace("\n", "\r\n").encode(),
    "twice-ended.csv": table(",").replace("\n", "\r\r\n").encode(),
    "mixed-ends.csv": table(",").replace("\n", "\r", 5).encode(),
    "utf-16.jsonl": JSON_LINES.encode("utf-16"),
    "utf-16-be.csv": b"\xfe\xff" + table(";").encode("utf-16-be"),
    "utf-32.jsonl": JSON_LINES.encode("utf-32"),
    "array.utf16.json": json.dumps(ROWS, ensure_ascii=False).encode("utf-16"),
    "bom.tsv": b"\xef\xbb\xbf" + table("\t").encode(),
    "rows.arrow": arrow_stream(),
    "rows.feather": feather("uncompressed"),
    "rows.parquet": parquet(),
    "no-suffix": parquet(),
}


@pytest.mark.parametrize("name", FILES)
def test_b6_the_same_rows_are_read_from_every_format(prepare: Prepare, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    _, result = prepare(tmp_path / name)
    assert [(one.instruction, one.references) for one in result] == [
        (row["instruction"], (row["reference"],)) for row in ROWS
    ]


def test_b6_a_return_within_quotes_is_text_and_lines_that_returns_end_are_counted(
    prepare: Prepare, tmp_path: Path
) -> None:
    (tmp_path / "in.csv").write_bytes(b'instruction,reference\r"a\rb",1\r"c\r\nd",2\r')
    result = prepare(tmp_path / "in.csv", test=0, validation=0)[1]
    assert [(one.instruction, one.references) for one in result] == [("a\rb", ("1",)), ("c\r\nd", ("2",))]
    (tmp_path / "in.csv").write_bytes(b"instruction,reference\ra,1\r,2\r")
    with pytest.raises(RecordError, match=r"in\.csv:3: instruction"):
        prepare(tmp_path / "in.csv", test=0, validation=0)


@pytest.mark.parametrize("indent", [None, 1])
def test_b6_an_array_that_is_cut_anywhere_is_said_to_end_early(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "in.json"
    whole = json.dumps([{"instruction": "Say \\ \u00e9.", "x": [True, None, -1.5e-30]}] * 2, indent=indent)
    for end in range(1, len(whole)):
        path.write_text(whole[:end])
        with pytest.raises(RecordError, match=r"in\.json.*truncated"):
            list(choose_reader(path)(path))


@pytest.mark.parametrize("wrong", ['"a" "b": 1', '"a": "\\x", "b": "c"', '"a": "\\u00", "b": "c"', '"a": nul, "b": 1'])
def test_b6_what_is_wrong_within_an_array_is_not_its_end(tmp_path: Path, wrong: str) -> None:
    path = tmp_path / "in.json"
    path.write_text(f'[{{"instruction": "a"}}, {{{wrong}}}, {{"instruction": "b"}}]')
    with pytest.raises(RecordError, match=r"in\.json:1: is not JSON \("):
        list(choose_reader(path)(path))


def test_b6_a_header_with_a_comma_and_other_marks_is_parted_by_commas(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("instruction,reference;s,reference\na;b,x,1|2\nc;d,y,3|4\n")
    (tmp_path / "in.csv").write_text("instruction,reference\na;b;c,1|2\nc;d,3|4\n")
    result = prepare(tmp_path / "in.csv", test=0, validation=0)[1]
    assert [(one.instruction, one.references) for one in result] == [("a;b;c", ("1|2",)), ("c;d", ("3|4",))]


def test_b6_a_semicolon_file_with_commas_in_its_texts_is_parted_by_semicolons(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("instruction;reference\nHello, you, there;x\nGood;y, z\n")
    result = prepare(tmp_path / "in.csv", test=0, validation=0)[1]
    assert [(one.instruction, one.references) for one in result] == [("Hello, you, there", ("x",)), ("Good", ("y, z",))]


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("rows.jsonl")
        info.size = len(UTF8)
        archive.addfile(info, io.BytesIO(UTF8))
    return buffer.getvalue()


REFUSED = {
    "two.zip": (zipped(UTF8, more={"b.jsonl": UTF8}), "is a zip archive of 2 files", "unzip two.zip -d FOLDER"),
    "book.xlsx": (zipped(b"", "[Content_Types].xml"), "is an Excel workbook", "libreoffice --headless --convert"),
    "book.xls": (b"\xd0\xcf\x11\xe0" + b"x" * 600, "is an Excel workbook", "libreoffice --headless --convert"),
    "rows.db": (b"SQLite format 3\0" + b"x" * 600, "is a SQLite database", "sqlite3 -header -csv rows.db"),
    "rows.tar": (tar(), "is a tar archive", "tar -xf rows.tar"),
    "rows.tar.gz": (gzip.compress(tar()), "is a tar archive", "tar -xf rows.tar.gz"),
    "rows.7z": (b"7z\xbc\xaf\x27\x1c" + b"x" * 60, "is a 7z archive", "7z x rows.7z"),
    "rows.pkl": (pickle.dumps(ROWS), "pickle", "JSON Lines or Parquet"),
    "rows.orc": (b"ORC" + b"x" * 60, "is an ORC file", "pandas.read_orc('rows.orc').to_parquet('rows.parquet')"),
    "rows.feather": (feather("zstd"), "is compressed Arrow (Feather)", "f.read_table('rows.feather')"),
    "rows.parquet.gz": (gzip.compress(parquet()), "is a compressed Parquet file", "decompress it first"),
    "bare.jsonl": (JSON_LINES.encode("utf-16-le"), "without a byte order mark", "iconv -f UTF-16LE -t UTF-8"),
    "latin.jsonl": (JSON_LINES.encode("latin-1"), "is not UTF-8 (byte", "iconv -f WINDOWS-1252 -t UTF-8 latin.jsonl"),
    "cut.json": (json.dumps(ROWS).encode()[:-1], "the array has no end", "fetch or write it again"),
    "half.json": (json.dumps(ROWS).encode()[:-30], ".json:1: the array ends within the", "fetch or write it"),
    "open.json": (b"[", "the array has no end", "fetch or write it again"),
    "wrong.json": (b'[{"instruction": "a" "reference": "b"}]', "is not JSON (Expecting ',' del", "one object per line"),
    "notes.txt": (b"Say one.\nSay two.\n", "is not JSON (Expecting value", "a .txt file is read as JSON Lines; give "),
    "rows.yaml": (b"- instruction: a\n  reference: b\n", "a .yaml file is read as JSON Lines", "CSV (.csv), TSV"),
    "rows.YML": (b"instruction: a\n", "a .YML file is read as JSON Lines", "Parquet (.parquet) or Arrow (.arrow)"),
    "number.txt": (b"5\n", "a .txt file is read as JSON Lines", "a JSON array (.json)"),
    "late.txt": (UTF8 + b"x\n", "late.txt:13: is not JSON (Expecting value", "write one object per line"),
    "rows": (b"Say one.\n", "a file without a suffix is read as JSON Lines", "JSON Lines (.jsonl)"),
    "fake.zip": (b"no archive\n", "named .zip but is not compressed", "fetch it again"),
    "fake.jsonl.gz": (b"no archive\n", "named .gz but is not compressed", "fetch it again"),
    "after.json": (json.dumps(ROWS).encode() + b" x", "after the end of the array", "delete it"),
    "numbers.json": (b'[{"instruction": "a", "reference": "b"}, 3]', "must be a JSON object, got 3", "one object per"),
    "held.json": (json.dumps({"version": 1, "data": ROWS}).encode(), "under 'data'", "jq -c '.[\"data\"][]'"),
    "frame.json": (
        json.dumps({name: {str(n): row[name] for n, row in enumerate(ROWS)} for name in ROWS[0]}).encode(),
        "table by columns",
        "orient='records', lines=True",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_b6_what_is_not_read_is_named_with_what_turns_it(prepare: Prepare, tmp_path: Path, name: str) -> None:
    data, what, command = REFUSED[name]
    (tmp_path / name).write_bytes(data)
    with raises_naming(RecordError, what, command) as error:
        prepare(tmp_path / name)
    assert "\n" not in str(error.value)


def test_b6_an_element_of_an_array_is_named_by_its_line(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(json.dumps([*ROWS[:2], {"prompt": "x"}], indent=1))
    with pytest.raises(RecordError, match=r"in\.json:10: .*instruction"):
        prepare(tmp_path / "in.json")


@pytest.mark.parametrize("pack", [bz2.compress, zipped, lambda data: pa.compress(data, codec="zstd", asbytes=True)])
def test_b6_a_damaged_archive_is_one_line(prepare: Prepare, tmp_path: Path, pack: Any) -> None:
    packed = pack("".join(f'{{"instruction": "{hash(str(n))}", "reference": "r"}}\n' for n in range(20_000)).encode())
    (tmp_path / "in.jsonl").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(RecordError, match=r"in\.jsonl.*(damaged|decompressed)"):
        prepare(tmp_path / "in.jsonl")


BOMB = """
import resource, sys
from pathlib import Path
from cappy.errors import RecordError
from cappy.preparation.files import choose_reader

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
path = Path(sys.argv[1])
try:
    list(choose_reader(path)(path))
except RecordError as error:
    print("refused", error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize(
    "pack",
    [bz2.compress, zipped, lambda data: pa.compress(data, codec="zstd", asbytes=True)],
    ids=["bz2", "zip", "zst"],
)
@pytest.mark.parametrize("begin", [b'{"instruction": "', b'[{"instruction": "'])
def test_b6_an_archive_that_unpacks_to_gigabytes_is_refused_within_memory(
    tmp_path: Path, pack: Callable[[bytes], bytes], begin: bytes
) -> None:
    (tmp_path / "in.jsonl").write_bytes(pack(begin + b"a" * 400_000_000))
    done = subprocess.run(
        [sys.executable, "-c", BOMB, str(tmp_path / "in.jsonl")], capture_output=True, text=True, check=True
    )
    refused, megabytes = done.stdout.splitlines()
    assert refused.startswith("refused")
    assert int(megabytes) < 350


def test_b6_a_large_array_is_read_row_by_row(tmp_path: Path) -> None:
    count = 0
    with (tmp_path / "in.json").open("w") as file:
        file.write("[")
        for number in range(20_000):
            file.write(("," if number else "") + json.dumps({"instruction": f"{number} {'word ' * 100}"}))
        file.write("]")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in choose_reader(tmp_path / "in.json")(tmp_path / "in.json"):
        count += 1
    assert count == 20_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000
    assert PIECE_CHARACTERS < 2**20


def test_a_text_that_stands_in_every_row_is_held_once(tmp_path: Path) -> None:
    path, text = tmp_path / "rows.parquet", "a" * 2**24
    table = pa.table({"instruction": pa.DictionaryArray.from_arrays(pa.array([0] * 2_000), [text])})
    pq.write_table(table, path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 2_000
    before = pa.total_allocated_bytes()
    rows: Any = read_parquet(path)
    _, first = next(rows)
    assert len(first["instruction"]) == len(text)
    assert pa.total_allocated_bytes() - before < 20 * len(text)
    rows.close()


@pytest.mark.parametrize("kind", [pa.string(), pa.int8(), pa.null()])
def test_a_row_of_millions_of_values_is_refused(tmp_path: Path, kind: Any) -> None:
    path = tmp_path / "rows.parquet"
    values = pa.ListArray.from_arrays(pa.array([0, 10_000_000], pa.int32()), pa.nulls(10_000_000, kind))
    pq.write_table(pa.table({"choices": values}), path, compression="zstd")
    with raises_naming(RecordError, f"{path}: row 1: ", "as Parquet", "67,108,864"):
        list(read_parquet(path))


def test_a_table_that_is_larger_than_a_row_may_be_comes_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.table({"text": [str(index) * 1_000_000 for index in range(10)] * 10, "tags": [["a", None], None] * 50})
    pq.write_table(table, path)
    assert [row for _, row in read_parquet(path)] == table.to_pylist()


def test_a_date_that_python_has_not_is_one_line(tmp_path: Path) -> None:
    pq.write_table(pa.table({"day": pa.array([2**31 - 1], pa.date32())}), tmp_path / "rows.parquet")
    with raises_naming(RecordError, "rows.parquet: row 1: ", "as Parquet"):
        list(read_parquet(tmp_path / "rows.parquet"))


def test_a_header_of_a_hundred_thousand_columns_is_read_at_once(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(",".join(f"c{index}" for index in range(100_000)) + "\n")
    assert list(read_csv(tmp_path / "rows.csv")) == []


def test_a_row_of_many_large_cells_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tables._MAX_RECORD_CHARACTERS == 64 * 2**20
    monkeypatch.setattr(tables, "_MAX_RECORD_CHARACTERS", 2**20)
    path = tmp_path / "rows.csv.gz"
    with gzip.open(path, "wb", 1) as file:
        file.write(b"a,b\n")
        for _ in range(12):
            file.write(b'"' + b"a\n" * 3 * 2**14 + b'",')
        file.write(b"b\n")
    with raises_naming(RecordError, "rows.csv.gz:2: ", "more than 1,048,576 characters", "quotes"):
        list(read_csv(path))


def test_an_archive_that_asks_for_too_much_memory_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lzma

    def refuse(*_: Any) -> bytes:
        raise MemoryError

    (tmp_path / "rows.jsonl.xz").write_bytes(lzma.compress(b"{}\n"))
    monkeypatch.setattr(lzma.LZMAFile, "readline", refuse)
    with raises_naming(RecordError, "rows.jsonl.xz", "memory"):
        list(read_lines(tmp_path / "rows.jsonl.xz"))


EXAMPLE = {"input": "x", "target_scores": {"a": 1, "b": 0}}
TASKS = {
    "a prefix that is a number": json.dumps({"task_prefix": 5, "examples": [EXAMPLE]}),
    "a prefix that is null": json.dumps({"choice_prefix": None, "examples": [EXAMPLE]}),
    "scores of two types": json.dumps({"examples": [{**EXAMPLE, "target_scores": {"a": 1, "b": "x"}}]}),
    "half a character": json.dumps({"examples": [{"input": "\ud800", "target": "a"}]}),
}


@pytest.mark.parametrize("text", TASKS.values(), ids=TASKS)
def test_a_task_of_other_types_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "task.json").write_text(text)
    with pytest.raises(RecordError, match=r"examples\[0\]: "):
        read_task(tmp_path / "task.json", 0)


def test_a_task_that_is_not_utf8_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "task.json").write_bytes(b"\xff{")
    with raises_naming(RecordError, "task.json", "not JSON"):
        read_task(tmp_path / "task.json", 0)


def test_a_file_of_gigabytes_is_not_read_to_see_whether_it_is_a_task(tmp_path: Path) -> None:
    with (tmp_path / "rows.json").open("wb") as file:
        file.truncate(20 * 2**30)
    assert not is_task(tmp_path / "rows.json")
