"""The scoring step: scores stand in the record under the scorer's version, the same for one shard or several."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from cappy.errors import ConfigError, RecordError
from cappy.preparation.step import PreparationConfig
from cappy.preparation.step import run as prepare
from cappy.records import read, read_manifest
from cappy.records.folder import describe_files, write_manifest
from cappy.scorers import scorer_folder
from cappy.scoring import Scorer
from cappy.scoring.step import ScoringConfig, run

ROWS = [
    '{"instruction": "Add 1 and 1.", "responses": ["2", "3", ""]}',
    '{"instruction": "Add 2 and 2.", "responses": ["4"]}',
    '{"instruction": "Add 3 and 3.", "responses": ["6", "6", "7"]}',
]


@pytest.fixture
def instances(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(ROWS))
    target = tmp_path / "instances"
    choices: dict[str, Any] = {"unlabelled": True, "test": 0.0, "validation": 0.0, "work": tmp_path / "work"}
    prepare(PreparationConfig(source=str(file), target=target, **choices))
    return target


def scored(instances: Path, tmp_path: Path, **more: Any) -> dict[tuple[str, str], dict[str, float]]:
    target = tmp_path / f"scored{more.get('shard', '').replace('/', '-')}"
    run(ScoringConfig(source=instances, target=target, precision="fp32", work=tmp_path / "work", **more))
    return {
        (instance.instruction, candidate.response): dict(candidate.scores)
        for instance in read(target)
        for candidate in instance.candidates
    }


def test_every_response_has_the_scorers_score_under_its_version(instances: Path, tmp_path: Path) -> None:
    scorer = Scorer.load("builtin:tiny", precision="fp32")
    result = scored(instances, tmp_path)
    assert len(result) == 6
    for (instruction, response), scores in result.items():
        if not response:
            assert scores == {}
            continue
        assert list(scores) == [scorer.version]
        assert scores[scorer.version] == pytest.approx(scorer.score([(instruction, response)])[0], abs=1e-4)
    assert read_manifest(tmp_path / "scored").facts["version"] == scorer.version


def test_shards_score_what_the_whole_does(instances: Path, tmp_path: Path) -> None:
    whole = scored(instances, tmp_path)
    parts = scored(instances, tmp_path, shard="0/2") | scored(instances, tmp_path, shard="1/2")
    assert set(parts) == set(whole)
    for pair, scores in whole.items():
        assert parts[pair] == pytest.approx(scores, abs=1e-4)


def test_a_second_scorer_adds_its_score_and_leaves_the_firsts(instances: Path, tmp_path: Path) -> None:
    first = scored(instances, tmp_path)
    other = tmp_path / "other"
    shutil.copytree(scorer_folder("builtin:tiny"), other)
    weights = load_file(other / "model.safetensors")
    weights = {name: values * 0.5 if name.startswith("classifier") else values for name, values in weights.items()}
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    write_manifest(other, replace(read_manifest(other), files=describe_files(other)))
    run(
        ScoringConfig(
            source=tmp_path / "scored",
            target=tmp_path / "twice",
            scorer=str(other),
            precision="fp32",
            work=tmp_path / "work",
        )
    )
    version = Scorer.load(str(other), precision="fp32").version
    for instance in read(tmp_path / "twice"):
        for candidate in instance.candidates:
            before = first[instance.instruction, candidate.response]
            kept = {name: score for name, score in candidate.scores.items() if name != version}
            assert kept == before
            assert (version in candidate.scores) == bool(candidate.response)
            assert candidate.scores.get(version) not in before.values() or not candidate.response


def test_rows_without_responses_or_references_are_refused_where_they_are_needed(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"instruction": "Add 1 and 1."}')
    with pytest.raises(RecordError, match=r"rows.jsonl:1: .*responses"):
        prepare(PreparationConfig(source=str(file), target=tmp_path / "a", unlabelled=True, work=tmp_path / "work"))
    file.write_text(ROWS[0])
    with pytest.raises(RecordError, match="no reference"):
        prepare(PreparationConfig(source=str(file), target=tmp_path / "b", work=tmp_path / "work"))


def test_what_was_prepared_to_be_scored_is_not_labelled(instances: Path, tmp_path: Path) -> None:
    from cappy.annotation.step import AnnotationConfig
    from cappy.annotation.step import run as annotate

    with pytest.raises(RecordError, match="no reference"):
        annotate(AnnotationConfig(source=instances, target=tmp_path / "c", work=tmp_path / "work"))


def test_a_target_that_is_the_source_is_refused(instances: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="source"):
        run(ScoringConfig(source=instances, target=instances, work=tmp_path / "work"))


def test_a4_pairs_that_were_cut_are_counted_in_the_manifest_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(f'{{"instruction": "Say {n}.", "responses": ["{"yes " * 400}", "no"]}}\n' for n in range(4))
    )
    choices: dict[str, Any] = {"unlabelled": True, "test": 0.0, "validation": 0.0, "work": tmp_path / "work"}
    prepare(PreparationConfig(source=str(file), target=tmp_path / "instances", **choices))
    run(ScoringConfig(source=tmp_path / "instances", target=tmp_path / "scored", part_rows=2, work=tmp_path / "work"))
    assert read_manifest(tmp_path / "scored").metrics["cut_pairs"] == 4
    (message,) = [one.message for one in caplog.records if "256 tokens" in one.message]
    assert message.startswith("4 pairs ")
