"""The step writes a whole report, counts leaks and does not score twice."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from cappy.config import ConfigError, build
from cappy.errors import FolderError
from cappy.evaluation import EvaluationConfig, read_report
from cappy.evaluation.step import evaluate_folder
from cappy.progress import silent
from cappy.records import Instance, Manifest, prompt_hash, write
from cappy.records.folder import describe_files, verify, write_manifest

Score = Callable[[Sequence[tuple[str, str]]], list[float]]


class FakeScorer:
    """Scores by a function and counts how many pairs it was given."""

    version = "abcdef123456"

    def __init__(self, score: Score, fail_after: int = 10**9) -> None:
        self._score = score
        self._fail_after = fail_after
        self.pairs = 0

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        self.pairs += len(pairs)
        if self.pairs > self._fail_after:
            raise KeyboardInterrupt
        return self._score(pairs)


@pytest.fixture
def folders(tmp_path: Path, instances: list[Instance]) -> Path:
    write(tmp_path / "instances", instances)
    for name in ("scorer", "champion"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"name": name}))
        files = describe_files(tmp_path / name)
        write_manifest(tmp_path / name, Manifest(step="finetuning", files=files))
    return tmp_path


def config(folders: Path, **values: object) -> EvaluationConfig:
    paths = {"source": folders / "instances", "scorer": folders / "scorer", "target": folders / "report"}
    return build(EvaluationConfig, {**paths, "work": folders / "work", "resamples": 200, **values})


def trained_on_first_three(instances: list[Instance], leaking: str) -> Callable[[Path], np.ndarray]:
    hashes = np.array([prompt_hash(i.instruction) for i in instances[:3]], dtype=np.uint64)
    return lambda folder: hashes if folder.name == leaking else np.array([], dtype=np.uint64)


def test_the_step_writes_a_report_that_can_be_verified_and_read(
    folders: Path, instances: list[Instance], score: Score
) -> None:
    manifest = evaluate_folder(
        config(folders, champion=str(folders / "champion")),
        silent,
        load=lambda path: FakeScorer(score),
        trained_on=trained_on_first_three(instances, "champion"),
    )
    assert verify(folders / "report") == manifest
    assert {file.name for file in manifest.files} == {
        "report.json",
        "report.html",
        "curve.png",
        "table.txt",
        "probe.json",
    }
    report = read_report(folders / "report")
    assert report.leaks == {"challenger": 0, "champion": 3}
    assert report.versions == {"challenger": "abcdef123456", "champion": "abcdef123456"}
    assert manifest.metrics["rougeL_scorer"] == report.selectors["scorer"].estimate.mean
    assert manifest.metrics["gain_over_random_low"] == report.comparisons["scorer-random"].low
    assert manifest.metrics["num_instances"] == 40
    assert len(manifest.parents) == 3
    assert (folders / "report" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_probe_holds_selectable_test_pairs_with_their_scores(
    folders: Path, instances: list[Instance], score: Score
) -> None:
    nothing = trained_on_first_three(instances, "")
    evaluate_folder(config(folders), silent, load=lambda path: FakeScorer(score), trained_on=nothing)
    triples = json.loads((folders / "report" / "probe.json").read_text())
    known = {(i.instruction, c.response) for i in instances if i.split == "test" for c in i.selectable}
    assert len(triples) == 32
    assert {(instruction, response) for instruction, response, _ in triples} <= known
    assert score([(i, r) for i, r, _ in triples]) == [value for _, _, value in triples]


def test_a_killed_run_keeps_the_scores_it_had(folders: Path, instances: list[Instance], score: Score) -> None:
    nothing = trained_on_first_three(instances, "")
    dying, second = FakeScorer(score, fail_after=150), FakeScorer(score)
    with pytest.raises(KeyboardInterrupt):
        evaluate_folder(config(folders), silent, load=lambda path: dying, trained_on=nothing)
    evaluate_folder(config(folders), silent, load=lambda path: second, trained_on=nothing)
    other = folders / "elsewhere"
    whole = FakeScorer(score)
    evaluate_folder(config(folders, work=other), silent, load=lambda path: whole, trained_on=nothing)
    assert 0 < second.pairs < whole.pairs


def test_another_scorer_does_not_get_the_kept_scores(folders: Path, instances: list[Instance], score: Score) -> None:
    nothing = trained_on_first_three(instances, "")
    evaluate_folder(config(folders), silent, load=lambda path: FakeScorer(score), trained_on=nothing)
    opposite = config(folders, scorer=folders / "champion", target=folders / "other")
    evaluate_folder(
        opposite, silent, load=lambda path: FakeScorer(lambda p: [-s for s in score(p)]), trained_on=nothing
    )
    one, two = (read_report(folders / name).selectors["scorer"].estimate.mean for name in ("report", "other"))
    assert one > two


def test_a_folder_without_a_report_says_what_to_give(folders: Path) -> None:
    with pytest.raises(FolderError, match="is no evaluation; give the folder that evaluation wrote"):
        read_report(folders / "scorer")


def test_settings_out_of_range_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluation: --resamples.*got 5"):
        config(tmp_path, resamples=5)
