"""What the step promises of every source."""

import csv
import gzip
import hashlib
import json
import lzma
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from wording import raises_naming

from cappy.config import build
from cappy.errors import ConfigError, FolderError, RecordError
from cappy.preparation import leakage
from cappy.preparation.step import PreparationConfig, run
from cappy.records import Candidate, Instance, Manifest, prompt_hash, read, write

E2E = Path(__file__).parents[2].parent / "shared/data/candidates/e2e_nlg.jsonl.gz"
Prepare = Callable[..., tuple[Manifest, list[Instance]]]
JsonLines = Callable[..., Path]


def test_the_least_that_a_row_may_have_becomes_an_instance(prepare: Prepare, json_lines: JsonLines) -> None:
    path = json_lines({"instruction": "Add.", "reference": "1"}, name="sums.jsonl")
    _, (instance,) = prepare(path, test=0, validation=0)
    group = f"{prompt_hash('Add.'):016x}"
    assert instance == Instance(
        instance_id=f"{group}-0", group_id=group, task="sums", instruction="Add.", references=("1",), split="train"
    )


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_labels_that_users_bring_are_kept_and_need_no_reference(prepare: Prepare, tmp_path: Path, suffix: str) -> None:
    values = [(0.25, 0.25), (1, 1.0), (True, 1.0), (False, 0.0), ("0.5", 0.5), ("False", 0.0)]
    rows = [{"instruction": f"Add {n}.", "response": "1", "label": label} for n, (label, _) in enumerate(values)]
    path = tmp_path / f"rated.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text("\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]))
    _, instances = prepare(path)
    result = [(instance.references, [dict(one.labels) for one in instance.candidates]) for instance in instances]
    assert result == [((), [{"given": label}]) for _, label in values]


def test_labels_stand_beside_their_responses(prepare: Prepare, json_lines: JsonLines) -> None:
    path = json_lines({"instruction": "Add.", "responses": ["1", "2"], "labels": [1, 0], "reference": "1"})
    _, (instance,) = prepare(path, test=0, validation=0)
    assert [(one.response, one.labels["given"]) for one in instance.candidates] == [("1", 1.0), ("2", 0.0)]
    assert instance.references == ("1",)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_fields_are_read_from_the_columns_that_are_named(prepare: Prepare, tmp_path: Path, suffix: str) -> None:
    rows = [{"question": f"Add {n}.", "references": "not these", "answer": str(n), "task": "sums"} for n in range(3)]
    path = tmp_path / f"named.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == "csv":
        path.write_text("\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)]))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    columns = ("instruction=question", "reference=answer")
    _, instances = prepare(path, columns=columns)
    assert [(i.instruction, i.references, i.task) for i in instances] == [
        (f"Add {n}.", (str(n),), "sums") for n in range(3)
    ]


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        (["question"], ("--columns", "'question' is not FIELD=COLUMN")),
        (["instruction="], ("--columns", "'instruction=' is not FIELD=COLUMN")),
        (["prompt=question"], ("--columns", "unknown field 'prompt'", "instruction, reference")),
        (["instruction=a", "instruction=b"], ("instruction", "one column", "'a' and 'b'")),
        (["instruction=a"], ("--columns", "give --source")),
    ],
)
def test_columns_that_cannot_be_meant_are_refused(tmp_path: Path, columns: list[str], parts: tuple[str, ...]) -> None:
    with raises_naming(ConfigError, *parts):
        build(PreparationConfig, {"target": tmp_path, "columns": columns})


def test_a_row_without_a_named_column_is_named(prepare: Prepare, json_lines: JsonLines) -> None:
    path = json_lines({"question": "a", "reference": "b"}, {"query": "a", "reference": "b"})
    remedy = "--columns instruction=question"
    with raises_naming(RecordError, f"{path}:2: ", "no column 'question'", "'query, reference'", remedy):
        prepare(path, columns=("instruction=question",))


def test_every_field_that_the_record_knows_is_kept_and_others_are_ignored(
    prepare: Prepare, json_lines: JsonLines
) -> None:
    row = {
        "instance_id": 7, "group_id": "g", "task": "t", "template": "p", "original_task": False, "split": "validation",
        "instruction": " Pick one. ", "references": ["b", " "], "choices": ["a", "b"], "responses": ["x", " "],
        "candidates": [
            {"generator": "m", "response": "y", "decoding": "beam", "seed": 3, "logprob_sum": -2.5, "logprob_mean": -1,
             "num_tokens": 2, "human_quality": 6.0},
            {"system": "n", "text": "z"},
        ],
        "source": "elsewhere", "nothing": None,
    }  # fmt: skip
    _, (instance,) = prepare(json_lines(row))
    assert instance == Instance(
        instance_id="7",
        group_id="g",
        task="t",
        template="p",
        original_task=False,
        split="validation",
        instruction=" Pick one. ",
        references=("b",),
        choices=("a", "b"),
        candidates=(
            Candidate(response="x", revision="imported"),
            Candidate(response=" ", revision="imported", status="empty"),
            Candidate(
                response="y",
                revision="imported",
                generator="m",
                decoding="beam",
                seed=3,
                logprob_sum=-2.5,
                logprob_mean=-1.0,
                num_tokens=2,
            ),
            Candidate(response="z", revision="imported", generator="n"),
        ),
    )


@pytest.mark.parametrize("form", ["JSON Lines", "JSON", "CSV", "Parquet", "records"])
def test_a_likelihood_is_complete_whatever_of_it_is_given(
    prepare: Prepare, json_lines: JsonLines, tmp_path: Path, form: str
) -> None:
    """Evaluation ranks by the sum and by the mean per token, so that both must be there where either can be known."""
    cases: list[tuple[dict[str, float], tuple[float | None, float | None]]] = [
        ({"logprob_sum": -6.0, "num_tokens": 4}, (-6.0, -1.5)),
        ({"logprob_mean": -0.5, "num_tokens": 6}, (-3.0, -0.5)),
        ({"logprob_sum": -6.0, "logprob_mean": -2.0, "num_tokens": 4}, (-6.0, -2.0)),
        ({"logprob_sum": -6.0, "num_tokens": 0}, (-6.0, None)),
        ({"logprob_sum": -6.0}, (-6.0, None)),
        ({"num_tokens": 4}, (None, None)),
    ]
    candidates = [{"text": f"t{n}", **values} for n, (values, _) in enumerate(cases)]
    row: dict[str, Any] = {"instruction": "Ask.", "reference": "x", "candidates": candidates}
    path = tmp_path / {"JSON": "rows.json", "CSV": "rows.csv", "Parquet": "rows.parquet"}.get(form, "rows")
    if form == "JSON Lines":
        path = json_lines(row)
    elif form == "JSON":
        path.write_text(json.dumps([row], indent=1))
    elif form == "CSV":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([row, [*list(row.values())[:2], json.dumps(candidates)]])
    elif form == "Parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        given = tuple(Candidate(response=str(each.pop("text")), **each) for each in candidates)  # type: ignore[arg-type]
        write(path, [Instance(instance_id="1", instruction="Ask.", references=("x",), candidates=given)])
    settings = {} if form == "records" else {"test": 0, "validation": 0}
    _, (instance,) = prepare(path, **settings)
    assert [(one.logprob_sum, one.logprob_mean) for one in instance.candidates] == [result for _, result in cases]


def test_choices_become_candidates_where_none_are_given(prepare: Prepare, json_lines: JsonLines) -> None:
    path = json_lines({"instruction": "Yes or no?", "references": "no", "choices": ["yes", "no"]})
    _, (instance,) = prepare(path, test=0, validation=0)
    assert instance.candidates == tuple(Candidate(response=text, source="choice") for text in ("yes", "no"))


def test_the_same_rows_are_the_same_instances_in_every_format(
    prepare: Prepare, json_lines: JsonLines, ten_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    plain = json_lines(*ten_rows).read_bytes()
    for name, content in {
        "gz.jsonl.gz": gzip.compress(plain),
        "xz.jsonl.xz": lzma.compress(plain),
        "misnamed.jsonl.gz": plain,
        "unnamed": gzip.compress(plain),
        "bom.jsonl": b"\xef\xbb\xbf" + plain,
        "blank.jsonl": plain.replace(b"\n", b"\r\n \n\n").rstrip(),
        "table.csv": "\r\n".join(
            ["reference,instruction,notes", *(f'{row["reference"]},"{row["instruction"]}",' for row in ten_rows)]
        ).encode(),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert prepare(tmp_path / name, task="sums")[1] == prepare(tmp_path / "data.jsonl", task="sums")[1], name
    pq.write_table(pa.Table.from_pylist(ten_rows), tmp_path / "table.parquet")
    assert prepare(tmp_path / "table.parquet", task="sums")[1] == prepare(tmp_path / "data.jsonl", task="sums")[1]


def test_a_cell_of_a_csv_file_may_hold_commas_quotes_and_line_ends(prepare: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text('id,instruction,reference,task\n1,"Say ""a,\nb"".","a,\nb",\n')
    _, (instance,) = prepare(path, test=0, validation=0)
    assert (instance.instance_id, instance.task) == ("1", "table")
    assert (instance.instruction, instance.references) == ('Say "a,\nb".', ("a,\nb",))


def test_equal_work_writes_an_equal_manifest_wherever_the_file_lies(
    json_lines: JsonLines, ten_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    first, second = json_lines(*ten_rows), json_lines(*ten_rows, name="other/data.jsonl")
    manifests = [
        run(PreparationConfig(source=str(path), target=tmp_path / f"t{n}", work=tmp_path / f"w{n}"))
        for n, path in enumerate((first, second))
    ]
    assert manifests[0].hash == manifests[1].hash
    assert str(tmp_path) not in manifests[0].to_json()


def test_another_content_name_or_seed_is_other_work(
    prepare: Prepare, json_lines: JsonLines, ten_rows: list[dict[str, Any]]
) -> None:
    path = json_lines(*ten_rows)
    hashes = {prepare(path)[0].hash, prepare(path, seed=1)[0].hash, prepare(path, task="other")[0].hash}
    json_lines(*ten_rows, {"instruction": "Add one to 10.", "reference": "11"})
    grown, instances = prepare(path)
    assert len(instances) == 11
    assert len({*hashes, grown.hash}) == 4


def test_the_manifest_names_the_file_by_its_sha256_and_counts_what_it_holds(
    prepare: Prepare, json_lines: JsonLines, ten_rows: list[dict[str, Any]]
) -> None:
    path = json_lines(*ten_rows, {**ten_rows[0], "instruction": " add ONE to  0.", "responses": ["1", "2"]})
    manifest, instances = prepare(path)
    assert manifest.parents == (hashlib.sha256(path.read_bytes()).hexdigest(),)
    splits = Counter[str](instance.split for instance in instances)
    assert manifest.metrics == {**splits, "instances": 11, "candidates": 2, "duplicates_of_instruction": 1}
    assert (manifest.step, manifest.seed, manifest.rows, manifest.candidates) == ("preparation", 0, 11, 2)


def test_progress_counts_instances_to_the_end(json_lines: JsonLines, ten_rows: list[Any], tmp_path: Path) -> None:
    messages: list[tuple[int, int | None, str]] = []

    def progress(done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = "") -> None:
        messages.append((done, total, unit))

    config = PreparationConfig(
        source=str(json_lines(*ten_rows)), target=tmp_path / "t", work=tmp_path / "w", part_rows=4
    )
    run(config, progress)
    assert messages == [(0, None, "instances checked"), *((n, 10, "instances") for n in (0, 4, 8, 10))]


def test_a_file_that_changes_while_it_is_read_is_refused(
    json_lines: JsonLines, ten_rows: list[Any], tmp_path: Path
) -> None:
    path = json_lines(*ten_rows)

    def append(done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = "") -> None:
        if unit == "instances" and done == 0:
            with path.open("a") as file:
                file.write('{"instruction": "new", "reference": "new"}\n')

    with raises_naming(FolderError, f"{path}: changed", "same command"):
        run(PreparationConfig(source=str(path), target=tmp_path / "t", work=tmp_path / "w"), append)
    assert not (tmp_path / "t").exists()


def test_a_folder_of_records_passes_through_unchanged(prepare: Prepare, tmp_path: Path) -> None:
    candidate = Candidate(response="r", generator="m", labels={"rougeL": 0.5}, scores={"v": 0.1})
    given = [
        Instance(instance_id="a", instruction="i", references=("r",), split="test", candidates=(candidate,)),
        Instance(instance_id="b", instruction="j", references=("r",), choices=("r", "s"), task="t"),
    ]
    parent = write(tmp_path / "records", given)
    manifest, instances = prepare(tmp_path / "records")
    assert instances == given
    assert manifest.parents == (parent.hash,)


def test_the_built_in_tasks_keep_their_splits_and_offer_their_choices(prepare: Prepare) -> None:
    tasks = pytest.importorskip("cappy.builtin.tasks", reason="the built-in tasks are not written yet")
    manifest, instances = prepare("builtin", num_per_family=12, seed=3)
    drawn = list(tasks.instances("adaptation", num_per_family=12, seed=3))
    assert [(i.instance_id, i.split, i.instruction) for i in instances] == [
        (i.instance_id, i.split, i.instruction) for i in drawn
    ]
    assert all([c.response for c in i.candidates] == list(i.choices) for i in instances)
    assert manifest.parents == ()
    name = drawn[0].task
    _, few = prepare("builtin", num_per_family=3, families=(name,))
    assert {i.task for i in few} == {name}


@pytest.mark.skipif(not E2E.exists(), reason="the real pool of E2E responses is not beside the project")
def test_every_candidate_of_a_real_pool_is_imported(prepare: Prepare) -> None:
    with gzip.open(E2E, "rt") as file:
        rows = [json.loads(line) for line in file]
    manifest, instances = prepare(E2E)
    assert [i.instance_id for i in instances] == [row["id"] for row in rows]
    for row, instance in zip(rows, instances, strict=True):
        assert [(c.generator, c.response) for c in instance.candidates] == [
            (given["system"], given["text"]) for given in row["candidates"]
        ]
    # 56 systems under "all/", and 21 of them once more under "primary/": an import keeps what the file holds.
    systems = Counter(c.generator.split("/")[0] for i in instances for c in i.candidates)
    assert (manifest.rows, manifest.candidates, systems) == (630, 48_295, {"all": 35_065, "primary": 13_230})
    assert {c.revision for i in instances for c in i.candidates} == {"imported"}


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Beyond the rows that are drawn to find near-duplicates; up to those it does.
    monkeypatch.setattr(leakage, "MAX_ROWS", 16)

    def peak(num_rows: int) -> int:
        path = tmp_path / f"{num_rows}.jsonl"
        with path.open("w") as file:
            for number in range(num_rows):
                file.write(json.dumps({"instruction": f"{number} {'word ' * 100}", "reference": "r"}) + "\n")
        config = PreparationConfig(
            source=str(path), target=tmp_path / f"t{num_rows}", work=tmp_path / "w", part_rows=64
        )
        tracemalloc.start()
        run(config)
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)
    small, large = peak(600), peak(2_600)
    # 2,000 more rows are 1 MB of text; their hashes, splits and ordinals are a few dozen bytes each.
    assert large - small < 2_000 * 150


KILLED = """
import json, os, signal, sys
from cappy.config import build
from cappy.preparation.step import PreparationConfig, run

def progress(done, total=None, *, unit="rows", resumed=0):
    if unit == "instances":
        print(done, resumed, flush=True)
        if str(done) == sys.argv[2]:
            os.kill(os.getpid(), signal.SIGKILL)

run(build(PreparationConfig, json.loads(sys.argv[1])), progress)
"""


def test_a_killed_run_resumes_without_doing_finished_parts_again(
    json_lines: JsonLines, ten_rows: list[Any], tmp_path: Path
) -> None:
    places = {"target": str(tmp_path / "t"), "work": str(tmp_path / "w")}
    values = json.dumps({"source": str(json_lines(*ten_rows)), **places, "part_rows": 2})
    command = [sys.executable, "-c", KILLED, values]
    killed = subprocess.run([*command, "6"], capture_output=True, text=True)
    assert (killed.returncode, killed.stdout.splitlines()[-1]) == (-9, "6 0")
    assert not (tmp_path / "t").exists()
    resumed = subprocess.run([*command, "never"], capture_output=True, text=True, check=True)
    assert resumed.stdout.splitlines() == ["0 0", "2 2", "4 4", "6 6", "8 6", "10 6"]
    assert [instance.references for instance in read(tmp_path / "t")] == [(str(n + 1),) for n in range(10)]


def test_fresh_does_finished_parts_again_once(json_lines: JsonLines, ten_rows: list[Any], tmp_path: Path) -> None:
    path = json_lines(*ten_rows)

    def resumed(fresh: str) -> int:
        seen = [0]

        def count(done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = "") -> None:
            seen.append(resumed)

        target = tmp_path / f"target{len(list(tmp_path.glob('target*')))}"
        run(PreparationConfig(source=str(path), target=target, work=tmp_path / "w", part_rows=2, fresh=fresh), count)
        return max(seen)

    assert [resumed(fresh) for fresh in ("", "", "one", "one", "two", "")] == [0, 10, 0, 10, 0, 10]


def test_importing_the_config_loads_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'transformers', 'mlflow', 'kfp', 'scipy', 'pandas')))\n"
        "import cappy.preparation\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"test": 1.0}, ("--test", "less than 1", "got 1.0")),
        ({"validation": -0.1}, ("--validation", "greater than or equal to 0", "got -0.1")),
        ({"test": float("nan")}, ("--test", "less than 1", "got nan")),
        ({"test": 0.6, "validation": 0.4}, ("--test 0.6", "--validation 0.4", "below 1")),
        ({"families": ["x"], "source": "in.jsonl"}, ("--families", "with a --source")),
        ({"source": ""}, ("--source", "at least 1 character", "got ''")),
        ({"pool": "llm"}, ("--pool", "'adaptation' or 'pretraining'", "got 'llm'")),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(values: dict[str, Any], parts: tuple[str, ...]) -> None:
    with raises_naming(ConfigError, "preparation: ", *parts) as caught:
        build(PreparationConfig, {"target": "t", **values})
    assert "\n" not in str(caught.value)


def test_the_candidates_of_excluded_systems_are_left_out(prepare: Prepare, json_lines: JsonLines) -> None:
    systems = [{"system": name, "text": name} for name in ("primary/x", "all/x", "all/y")]
    rows = [{"instruction": f"say {n}", "references": ["x"], "candidates": systems} for n in range(4)]
    _, instances = prepare(json_lines(*rows), exclude=("primary/*", "*y"))
    assert len(instances) == 4
    for instance in instances:
        assert [candidate.generator for candidate in instance.candidates] == ["all/x"]


def test_choices_stay_candidates_whatever_is_excluded(prepare: Prepare, json_lines: JsonLines) -> None:
    closed = {"instruction": "Yes or no?", "references": ["no"], "choices": ["yes", "no"]}
    sampled = {**closed, "instruction": "No or yes?", "candidates": [{"system": "m", "text": "no"}]}
    _, instances = prepare(json_lines(closed, sampled), exclude=("*",), test=0, validation=0)
    for instance in instances:
        assert [(one.response, one.source) for one in instance.candidates] == [("yes", "choice"), ("no", "choice")]
