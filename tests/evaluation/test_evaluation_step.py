"""The step writes a whole report, counts leaks and does not score twice."""

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from wording import raises_naming

from cappy.config import build
from cappy.errors import ConfigError, FolderError
from cappy.evaluation import read_report
from cappy.evaluation.step import EvaluationConfig, evaluate_folder
from cappy.evaluation.threshold import find_threshold
from cappy.progress import silent
from cappy.records import Candidate, Instance, Manifest, prompt_hash, write
from cappy.records.folder import describe_files, sha256_of, verify, write_manifest
from cappy.records.instance import Status
from cappy.selection import read_selector
from cappy.selection.linear import SELECTOR, Feature, Rule, Selector

Score = Callable[[Sequence[tuple[str, str]]], list[float]]
STARTS = (("test", 0), ("validation", 100))
"""Where the numbers of the fixture's instances start."""


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
    return build(EvaluationConfig, {**paths, "work": folders / "work", **values})


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
        *("report.json", "report.html", "report.md", "table.txt"),
        *("curve.png", "curve.svg", "calibration.png", "calibration.svg"),
        *("selector.json", "calibration.json", "picks.json", "probe.json"),
    }
    report = read_report(folders / "report")
    assert report.leaks == {"challenger": 0, "champion": 3}
    assert report.versions == {"challenger": "abcdef123456", "champion": "abcdef123456"}
    assert report.selector_hashes == {"challenger": sha256_of(folders / "report/selector.json"), "champion": ""}
    assert read_selector(folders / "report", "abcdef123456").groups == 20
    assert manifest.metrics["rougeL_selector"] == report.selectors["selector"].estimate.mean
    assert manifest.metrics["gain_over_random_low"] == report.comparisons["selector-random"].low
    assert manifest.metrics["num_instances"] == 40
    assert len(manifest.parents) == 3
    assert (folders / "report" / "curve.png").read_bytes().startswith(b"\x89PNG")


def with_rule(folder: Path, **weights: float) -> Selector:
    """Writes a selector with one rule into a scorer's folder."""
    names: tuple[Feature, ...] = ("score", "mbr", "likelihood", "greedy")
    rule = Rule(features=names, weights=tuple(weights.get(name, 0.0) for name in names))
    selector = Selector(rules=(rule,), metric="rougeL", groups=50, scorer=FakeScorer.version, decoding="a greedy")
    (folder / SELECTOR).write_text(selector.to_json())
    return selector


def all_greedy(folders: Path, instances: Sequence[Instance], generator: str) -> list[float]:
    """Marks the second response of each instance as the greedy one; returns their labels in the test split."""
    marked = [
        replace(
            one,
            candidates=tuple(
                replace(c, generator=generator, decoding=name)
                for c, name in zip(one.candidates, ["topp0.9", "greedy", *["topp0.9"] * 9], strict=False)
            ),
        )
        for one in instances
    ]
    shutil.rmtree(folders / "instances")
    write(folders / "instances", marked)
    return [one.candidates[1].labels["rougeL"] for one in marked if one.split == "test"]


@pytest.mark.parametrize("generator", ["a", "another LLM"])
def test_a_selector_that_a_scorer_has_already_is_the_one_that_is_evaluated(
    folders: Path, instances: list[Instance], score: Score, generator: str
) -> None:
    """A registered version: what is served, with the greedy response of any LLM, is what the report is about."""
    expected = np.mean(all_greedy(folders, instances, generator))
    with_rule(folders / "scorer", greedy=1.0)
    unseen = trained_on_first_three(instances, "")
    evaluate_folder(config(folders), silent, load=lambda path: FakeScorer(score), trained_on=unseen)
    report = read_report(folders / "report")
    assert report.selectors["selector"].estimate.mean == pytest.approx(expected)
    assert (folders / "report" / SELECTOR).read_bytes() == (folders / "scorer" / SELECTOR).read_bytes()
    refitted = config(folders, refit_selector=True, target=folders / "refitted")
    evaluate_folder(refitted, silent, load=lambda path: FakeScorer(score), trained_on=unseen)
    assert read_selector(folders / "refitted").groups == 20
    (folders / "scorer" / SELECTOR).unlink()
    evaluate_folder(
        config(folders, target=folders / "again"), silent, load=lambda path: FakeScorer(score), trained_on=unseen
    )
    assert read_selector(folders / "again").groups == 20, "the work of before is not taken for this"


@pytest.mark.parametrize("generator", ["a", "another LLM"])
def test_the_champion_is_compared_by_its_own_selector(
    folders: Path, instances: list[Instance], score: Score, generator: str
) -> None:
    expected = np.mean(all_greedy(folders, instances, generator))
    with_rule(folders / "champion", greedy=1.0)
    own = config(folders, champion=str(folders / "champion"))
    evaluate_folder(own, silent, load=lambda path: FakeScorer(score), trained_on=trained_on_first_three(instances, ""))
    report = read_report(folders / "report")
    assert report.selectors["champion"].estimate.mean == pytest.approx(expected)
    assert report.selectors["champion"].detail == "greedy"
    assert report.selector_hashes["champion"] == sha256_of(folders / "champion" / SELECTOR)
    with_rule(folders / "champion", mbr=1.0)
    evaluate_folder(
        replace(own, target=folders / "again"),
        silent,
        load=lambda path: FakeScorer(score),
        trained_on=trained_on_first_three(instances, ""),
    )
    report = read_report(folders / "again")
    assert report.selectors["champion"].estimate.mean == pytest.approx(report.selectors["mbr"].estimate.mean)


def initial_folder(folders: Path, architecture: str) -> str:
    folder = folders / "initial"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": [architecture]}))
    write_manifest(folder, Manifest(step="pretraining", files=describe_files(folder)))
    return str(folder)


def test_the_report_shows_what_adaptation_gained(folders: Path, instances: list[Instance], score: Score) -> None:
    def load(path: str) -> FakeScorer:
        return FakeScorer((lambda pairs: [-value for value in score(pairs)]) if path.endswith("initial") else score)

    initial = initial_folder(folders, "BertForSequenceClassification")
    unseen = trained_on_first_three(instances, "")
    manifest = evaluate_folder(config(folders, initial=initial), silent, load=load, trained_on=unseen)
    report = read_report(folders / "report")
    before, after = (report.selectors[name].estimate.mean for name in ("initial", "scorer"))
    assert report.comparisons["scorer-initial"].difference == pytest.approx(after - before)
    assert report.comparisons["scorer-initial"].low > 0
    assert manifest.metrics["scorer_gain_over_initial"] == report.comparisons["scorer-initial"].difference
    table = (folders / "report/table.txt").read_text()
    assert "scorer before adaptation" in table
    assert "Adaptation improved the scorer's picks: " in table
    assert len(manifest.parents) == 3


@pytest.mark.parametrize(
    ("architecture", "leaking", "reason"),
    [
        ("BertModel", "", "an encoder"),
        ("BertForSequenceClassification", "initial", "trained on 3 of the reported instances"),
    ],
)
def test_an_initial_scorer_that_cannot_be_compared_has_a_reason_instead_of_a_row(
    folders: Path, instances: list[Instance], score: Score, architecture: str, leaking: str, reason: str
) -> None:
    initial = initial_folder(folders, architecture)
    trained = trained_on_first_three(instances, leaking)
    own = config(folders, initial=initial)
    evaluate_folder(own, silent, load=lambda path: FakeScorer(score), trained_on=trained)
    report = read_report(folders / "report")
    assert "initial" not in report.selectors
    assert reason in report.unavailable["initial"]
    assert reason in (folders / "report/table.txt").read_text()
    assert set(report.leaks) == {"challenger"}


def test_a_threshold_is_detected_in_the_picks_and_knows_their_groups(
    folders: Path, instances: list[Instance], score: Score
) -> None:
    paired = [replace(one, group_id=f"row {index // 2}") for index, one in enumerate(instances)]
    write(folders / "paired", paired)
    nothing = trained_on_first_three(instances, "")
    own = config(folders, source=folders / "paired")
    evaluate_folder(own, silent, load=lambda path: FakeScorer(score), trained_on=nothing)
    result = find_threshold(folders / "report", precision=0.0, good=0.5)
    assert result is not None
    assert result.reported == 40
    assert result.coverage > 0.9
    assert round(result.coverage * 40) / 2 <= result.groups <= 20


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
    with raises_naming(FolderError, f"{folders / 'scorer'}: ", "report.json", "evaluation wrote"):
        read_report(folders / "scorer")


def test_settings_out_of_range_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with raises_naming(ConfigError, "--folds", "50"):
        config(tmp_path, folds=50)


def no_number(text: str) -> None:
    raise AssertionError(f"{text} stands in the report")


@pytest.mark.parametrize("known", ["none", "some", "held-out", "reported"])
def test_what_sampling_could_not_get_leaves_a_report_that_says_so(
    tmp_path: Path, folders: Path, instances: list[Instance], score: Score, known: str
) -> None:
    """Whole instances without a response to select, candidates without a likelihood: both are what endpoints give."""
    statuses: list[Status] = ["refused", "filtered", "empty", "failed"]
    hollow = {f"{split}-{start + n}": status for split, start in STARTS for n, status in enumerate(statuses)}

    def mended(instance: Instance) -> Instance:
        if instance.instance_id in hollow:
            nothing = Candidate(response="", status=hollow[instance.instance_id], generator="large")
            return replace(instance, candidates=(nothing, nothing))
        kept = {"none": 0, "some": 3, "held-out": 6 * (instance.split == "validation")}
        number = kept.get(known, 6 * (instance.split == "test"))
        bare = [replace(one, logprob_sum=None, logprob_mean=None) for one in instance.candidates[number:]]
        return replace(instance, candidates=(*instance.candidates[:number], *bare))

    write(tmp_path / "mended", [mended(instance) for instance in instances])
    leaking = trained_on_first_three(instances, "champion")
    settings = config(folders, source=tmp_path / "mended", champion=str(folders / "champion"))
    manifest = evaluate_folder(settings, silent, load=lambda path: FakeScorer(score), trained_on=leaking)
    values = json.loads((folders / "report/report.json").read_text(), parse_constant=no_number)
    page = (folders / "report/report.html").read_text()
    facts = values["facts"]
    assert (facts["instances"], facts["skipped_instances"], facts["held_out_instances"]) == (36, 4, 16)
    assert "4 more skipped" in page
    # The first three instances are among those that are not reported.
    assert values["leaks"] == {"challenger": 0, "champion": 0}
    for name in ("likelihood_sum", "likelihood_mean"):
        assert (name in values["selectors"]) is (known == "reported")
        assert (name in values["unavailable"]) is (known != "reported")
    assert known == "reported" or re.search("36 of 36 .*log-likelihood", page)
    assert ("selector-likelihood" in values["comparisons"]) is (known == "reported")
    assert {"selector", "scorer"} <= values["selectors"].keys()
    assert all(math.isfinite(value) for value in manifest.metrics.values())
    probed = {instruction for instruction, _, _ in json.loads((folders / "report/probe.json").read_text())}
    assert probed.isdisjoint(i.instruction for i in instances if i.instance_id in hollow)
