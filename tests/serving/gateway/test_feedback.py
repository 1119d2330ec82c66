"""The feedback log: what was answered, what users said of it, and that the house reads it."""

import contextlib
import dataclasses
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
from chat_server import Model, serving
from gateway_server import gateway, listening, sampled
from hypothesis import given, settings
from hypothesis import strategies as st
from wording import raises_naming

from cappy.annotation import step as annotation
from cappy.errors import FolderError, RecordError
from cappy.preparation import step as preparation
from cappy.records import Candidate, Instance, read, read_manifest
from cappy.records.folder import verify
from serving.gateway.feedback import AppendableDataset, FeedbackLog, FeedbackRow


@contextlib.contextmanager
def kept(folder: Path) -> Iterator[str]:
    """The base URL of a gateway that keeps its answers there."""
    made: dict[str, Any] = {"policy": sampled(candidates=3, min_gain=0)}
    with serving(Model()) as upstream, listening(gateway(upstream, **made), feedback=FeedbackLog(folder)) as url:
        yield url


def ask(url: str, text: str, **more: object) -> dict[str, Any]:
    body = {"model": "m", "messages": [{"role": "user", "content": text}], "temperature": 0.5, **more}
    answer: dict[str, Any] = httpx.post(f"{url}/chat/completions", json=body).json()
    return answer


def tell(url: str, **feedback: object) -> httpx.Response:
    return httpx.post(f"{url}/feedback", json=feedback)


def test_every_answer_is_kept_with_its_candidates_and_their_scores(tmp_path: Path) -> None:
    with kept(tmp_path) as url:
        identity = ask(url, "hello", seed=1)["id"]
    verify(tmp_path / "answers")
    (row,) = rows_of(tmp_path / "answers")
    assert (row["instance_id"], row["instruction"], row["references"]) == (identity, "hello", [])
    best = row["candidates"][0]
    assert (best["response"], best["source"], best["status"]) == ("HELLO 1/2", "llm", "ok")
    assert best["scores"] == [("0123456789ab", 0.12)]
    assert best["generator"].startswith("openai:m@http://127.0.0.1")
    assert (best["revision"], best["decoding"], best["seed"]) == ("m-2026", "temperature=0.5", 1)
    assert len(row["candidates"]) == 3


def test_what_is_not_rated_can_be_scored_and_not_learnt_from(tmp_path: Path) -> None:
    with kept(tmp_path) as url:
        ask(url, "hello")
    (answer,) = read(tmp_path / "answers")
    assert answer.candidates
    config = annotation.AnnotationConfig(
        source=tmp_path / "answers", target=tmp_path / "labels", work=tmp_path / "work"
    )
    with pytest.raises(RecordError, match="reference"):
        annotation.run(config)
    assert not (tmp_path / "rated/manifest.json").exists()


def test_a_reference_makes_an_instance_that_annotation_and_preparation_read(tmp_path: Path) -> None:
    with kept(tmp_path / "log") as url:
        for number in range(12):
            identity = ask(url, f"say {number}")["id"]
            assert tell(url, id=identity, reference=f"SAY {number}").json() == {"id": identity, "kept": True}
    folder = tmp_path / "log/referenced"
    instances = list(read(folder))
    assert {one.references for one in instances} == {(f"SAY {number}",) for number in range(12)}
    assert {one.split for one in instances} > {"train"}
    annotated = annotation.run(
        annotation.AnnotationConfig(source=folder, target=tmp_path / "labels", work=tmp_path / "work")
    )
    assert annotated.rows == 12
    labelled = next(iter(read(tmp_path / "labels")))
    assert max(one.labels["rougeL"] for one in labelled.candidates if one.source == "llm") > 0
    preparation.run(
        preparation.PreparationConfig(source=str(folder), target=tmp_path / "prepared", work=tmp_path / "work")
    )


def test_scores_label_the_rated_choices_and_the_last_word_counts(tmp_path: Path) -> None:
    with kept(tmp_path / "log") as url:
        identity = ask(url, "hello", n=2)["id"]
        for choice, score in ((0, 1.0), (1, 0.0), (0, 0.25)):
            assert tell(url, id=identity, score=score, choice=choice).status_code == 200
    (instance,) = read(tmp_path / "log/rated")
    assert [(one.response, one.labels["given"]) for one in instance.candidates] == [
        ("HELLO None/1", 0.0),
        ("HELLO None/2", 0.25),
    ]
    annotated = annotation.AnnotationConfig(
        source=tmp_path / "log/rated", target=tmp_path / "labels", metric="given", work=tmp_path / "work"
    )
    assert annotation.run(annotated).rows == 1


def test_feedback_outlives_a_restart(tmp_path: Path) -> None:
    with kept(tmp_path) as url:
        identity = ask(url, "hello")["id"]
    with kept(tmp_path) as url:
        other = ask(url, "other")["id"]
        assert tell(url, id=identity, score=0.5).status_code == 200
        assert tell(url, id=identity, reference="HELLO").status_code == 200
    assert [one.instance_id for one in read(tmp_path / "rated")] == [identity]
    assert [one["instance_id"] for one in rows_of(tmp_path / "answers")] == [identity, other]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"id": "chatcmpl-none", "score": 1}, 404),
        ({"id": "x"}, 400),
        ({"id": "x", "score": 1, "reference": "y"}, 400),
        ({"id": "x", "score": 1.5}, 400),
        ({"id": "x", "reference": "  "}, 400),
        ({"id": "x", "score": True}, 400),
        ({"score": 1}, 400),
        ({"id": "x", "score": 1, "other": 1}, 400),
        ([], 400),
    ],
)
def test_feedback_of_another_shape_is_refused(tmp_path: Path, body: object, status: int) -> None:
    with kept(tmp_path) as url:
        answer = httpx.post(f"{url}/feedback", json=body)
        far = tell(url, id=ask(url, "hello")["id"], score=1, choice=9)
    assert (answer.status_code, set(answer.json())) == (status, {"error"})
    assert far.status_code == 400
    assert not (tmp_path / "rated/manifest.json").exists()


def test_nothing_is_kept_unless_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with serving(Model()) as upstream, listening(gateway(upstream)) as url:
        identity = ask(url, "hello")["id"]
        answer = tell(url, id=identity, score=1)
    assert answer.status_code == 404
    assert "--feedback FOLDER" in answer.json()["error"]["message"]
    assert list(tmp_path.iterdir()) == []


def test_an_answer_is_given_where_the_disk_refuses_to_keep_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise FolderError("no room left on the disk")

    monkeypatch.setattr(AppendableDataset, "put", full)
    with kept(tmp_path) as url:
        assert "choices" in ask(url, "hello")
    assert "feedback: no room left on the disk" in caplog.text


def row(number: int, text: str = "x") -> FeedbackRow:
    candidate = Candidate(response=text, scores={"v": 0.5})
    return FeedbackRow(
        instance_id=f"id-{number}", instruction="i", candidates=(candidate,), group_id="g", split="train"
    )


def rows_of(folder: Path) -> list[dict[str, Any]]:
    files = read_manifest(folder).files
    return [one for file in files for one in pq.read_table(folder / file.name).to_pylist()]


def rows_on_disk(folder: Path) -> dict[str, str]:
    if not (folder / "manifest.json").exists():
        return {}
    verify(folder)
    rows = rows_of(folder)
    result = {one["instance_id"]: one["candidates"][0]["response"] for one in rows}
    assert len(result) == len(rows)
    return result


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from("abc"), st.sampled_from(["put", "flush", "open again"]))))
def test_a_dataset_holds_the_last_row_of_each_id_whatever_happens_between(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("shelf")
    dataset, expected = AppendableDataset(folder, part_rows=3), {}
    for number, text, step in steps:
        if step == "put":
            dataset.put(row(number, text))
            expected[f"id-{number}"] = text
        elif step == "flush":
            dataset.flush()
            assert rows_on_disk(folder) == expected
        else:
            dataset.close()
            dataset = AppendableDataset(folder, part_rows=3)
        assert len(dataset._open_rows) < 3
        for identity, text in expected.items():
            result = dataset.get(identity)
            assert result is not None
            assert result.candidates[0].response == text
    dataset.close()
    assert rows_on_disk(folder) == expected
    assert dataset.get("id-none") is None


def test_a_row_that_changes_in_a_closed_part_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    dataset = AppendableDataset(tmp_path, part_rows=3)
    for number in range(4):
        dataset.put(row(number))
    dataset.put(row(1, "new"))
    assert rows_on_disk(tmp_path) == {"id-0": "x", "id-1": "new", "id-2": "x", "id-3": "x"}
    dataset.close()


def test_an_answer_is_looked_for_without_reading_parts_that_do_not_hold_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = AppendableDataset(tmp_path, part_rows=3)
    for number in range(30):
        dataset.put(row(number))
    dataset.get("id-none")
    read_table, names = pq.read_table, []

    def counted(source: Path, **more: Any) -> Any:
        names.append(source)
        return read_table(source, **more)

    monkeypatch.setattr(pq, "read_table", counted)
    assert dataset.get("id-of-somebodys-own") is None
    dataset.put(row(30))
    assert names == []
    assert dataset.get("id-0") is not None
    assert len(set(names)) == 1
    dataset.close()


def test_what_users_wrote_fills_a_part_references_too(tmp_path: Path) -> None:
    dataset = AppendableDataset(tmp_path, part_characters=1000)
    for number in range(4):
        dataset.put(dataclasses.replace(row(number), references=("r" * 600,)))
    assert len(dataset._open_rows) < 2
    dataset.close()


def test_a_row_that_is_put_again_counts_once(tmp_path: Path) -> None:
    dataset = AppendableDataset(tmp_path, part_characters=1000)
    for _ in range(4):
        dataset.put(dataclasses.replace(row(0), references=("r" * 600,)))
    assert len(dataset._open_rows) == 1
    dataset.close()


def _die_while_writing(folder: Path, step: int) -> None:

    dataset = AppendableDataset(folder, part_rows=3)
    replaced = 0
    replace = Path.replace

    def dying(self: Path, target: Path) -> Path:
        nonlocal replaced
        replaced += 1
        if replaced > step:
            os._exit(9)
        return replace(self, target)

    setattr(Path, "replace", dying)  # noqa: B010 # this process ends with it
    for number in range(20):
        dataset.put(row(number))
        dataset.flush()


@pytest.mark.parametrize("step", [0, 1, 2, 5, 6, 9])
def test_a_crash_at_any_moment_leaves_a_whole_folder(tmp_path: Path, step: int) -> None:
    process = multiprocessing.get_context("fork").Process(target=_die_while_writing, args=(tmp_path, step))
    process.start()
    process.join(30)
    assert process.exitcode == 9
    before = rows_on_disk(tmp_path)
    assert len(before) == step // 2
    dataset = AppendableDataset(tmp_path, part_rows=3)
    dataset.put(row(100))
    dataset.close()
    assert rows_on_disk(tmp_path) == before | {"id-100": "x"}
    named = {file.name for file in read_manifest(tmp_path).files}
    assert {path.name for path in tmp_path.glob("part-*")} == named


def test_one_folder_is_of_one_gateway(tmp_path: Path) -> None:
    dataset = AppendableDataset(tmp_path)
    with raises_naming(FolderError, str(tmp_path), "another gateway"):
        AppendableDataset(tmp_path)
    dataset.close()
    AppendableDataset(tmp_path).close()


def test_an_answer_has_the_columns_of_an_instance() -> None:
    names = [field.name for field in dataclasses.fields(FeedbackRow)]
    assert set(names) == {field.name for field in dataclasses.fields(Instance)}
