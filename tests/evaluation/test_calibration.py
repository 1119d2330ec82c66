"""Calibration says how far scores are from labels, mends it on held-out instances, and abstains where it should."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from cappy.errors import FolderError
from cappy.evaluation import calibration
from cappy.evaluation.report import SCHEMA
from cappy.evaluation.threshold import lowest, sentence, threshold
from cappy.records import Manifest
from cappy.records.folder import describe_files, write_manifest
from cappy.scoring.calibration import Calibration, read_calibration

RNG = np.random.default_rng(0)
SCORES = RNG.random(4000)


def test_exact_scores_have_no_error_and_shifted_ones_theirs() -> None:
    assert calibration.reliability(SCORES, SCORES).ece == pytest.approx(0.0, abs=1e-12)
    shifted = calibration.reliability(SCORES + 0.25, SCORES)
    assert shifted.ece == pytest.approx(0.25)
    assert shifted.brier == pytest.approx(0.0625)


def test_bins_hold_every_pair_once_and_rise() -> None:
    bins = calibration.reliability(SCORES, SCORES**2).bins
    assert sum(one.count for one in bins) == len(SCORES)
    assert len(bins) == calibration.NUM_BINS
    assert [one.score for one in bins] == sorted(one.score for one in bins)


def test_the_order_of_rows_changes_nothing_where_scores_are_equal() -> None:
    labels = np.repeat([0.0, 1.0], 100)
    shuffled = RNG.permutation(labels)
    level = np.full(200, 0.5)
    assert calibration.reliability(level, labels).ece == calibration.reliability(level, shuffled).ece == 0.0


def test_a_map_fitted_on_one_half_mends_the_other() -> None:
    labels = (RNG.random(len(SCORES)) < SCORES**3).astype(float)
    found = calibration.fit(SCORES[:2000], labels[:2000], "rougeL")
    assert found is not None
    mapped = np.array(found.apply(SCORES[2000:].tolist()))
    before, after = (calibration.reliability(values, labels[2000:]) for values in (SCORES[2000:], mapped))
    assert before.ece > 0.2
    assert after.ece < 0.05
    assert after.brier < before.brier


def test_the_map_is_the_best_monotone_one() -> None:
    """Against the definition: the mean of every level equals the labels' mean there, and levels rise."""
    scores = np.repeat(np.arange(20.0), 5)
    labels = np.clip(scores / 20 + RNG.normal(0, 0.2, len(scores)), 0, 1)
    found = calibration.fit(scores, labels, "rougeL")
    assert found is not None
    fitted = np.array(found.apply(scores.tolist()))
    one_level = np.full(len(labels), labels.mean())
    straight = np.clip(np.polyval(np.polyfit(scores, labels, 1), scores), 0, 1)
    assert np.mean((fitted - labels) ** 2) < min(np.mean((other - labels) ** 2) for other in (one_level, straight))
    for level in np.unique(fitted):
        assert labels[fitted == level].mean() == pytest.approx(level)
    assert (np.diff(fitted[np.argsort(scores, kind="stable")]) >= 0).all()


def test_the_map_keeps_the_order_and_stays_between_0_and_1() -> None:
    found = calibration.fit(SCORES * 3 - 1, np.clip(SCORES + RNG.normal(0, 0.3, len(SCORES)), 0, 1), "rougeL")
    assert found is not None
    values = found.apply(np.linspace(-5, 5, 200).tolist())
    assert values == sorted(values)
    assert 0 <= min(values) <= max(values) <= 1


def test_too_few_held_out_candidates_fit_nothing() -> None:
    few = calibration.MIN_FITTED - 1
    assert calibration.fit(SCORES[:few], SCORES[:few], "rougeL") is None


def test_a_map_goes_to_a_folder_and_back(tmp_path: Path) -> None:
    found = calibration.fit(SCORES, SCORES, "rougeL")
    assert found is not None
    assert read_calibration(tmp_path) is None
    (tmp_path / "calibration.json").write_text(found.to_json())
    assert read_calibration(tmp_path) == found


@pytest.mark.parametrize(
    "damage", [{"scores": []}, {"expected": [0.9, 0.1]}, {"kind": "magic"}, {"metric": None, "fitted_on": "x"}]
)
def test_a_damaged_map_is_refused(tmp_path: Path, damage: dict[str, object]) -> None:
    values = json.loads(Calibration((0.0, 1.0), (0.0, 1.0), "rougeL", 99).to_json())
    (tmp_path / "calibration.json").write_text(json.dumps({**values, **damage}))
    with pytest.raises(FolderError, match=r"calibration\.json: is no calibration"):
        read_calibration(tmp_path)


def test_answering_the_surest_half_is_better_than_answering_all() -> None:
    found = calibration.coverage(SCORES.tolist(), SCORES)
    assert found.quality[-1] == pytest.approx(found.random) == pytest.approx(SCORES.mean())
    assert list(found.quality) == sorted(found.quality, reverse=True)
    assert found.quality[4] == pytest.approx(np.sort(SCORES)[2000:].mean())


def test_the_threshold_is_the_lowest_that_keeps_the_precision() -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    good = np.array([True, True, False, True, False])
    assert lowest(scores, good, 1.0) == 0.8
    assert lowest(scores, good, 0.75) == 0.6
    assert lowest(scores, good, 0.5) == 0.5
    assert lowest(scores, np.zeros(5, dtype=bool), 0.1) is None


def test_picks_of_equal_score_are_kept_together() -> None:
    assert lowest(np.array([0.9, 0.5, 0.5]), np.array([True, True, False]), 1.0) == 0.9


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """100 held-out picks, good from 0.5 on, and 9 reported ones, one bad above it; each is of a group of its own."""
    held = [(index / 100, float(index >= 50), str(index)) for index in range(100)]
    reported = [(0.1 + index / 10, float(index >= 4 and index != 6), str(index)) for index in range(9)]
    (tmp_path / "report.json").write_text(json.dumps({"schema": SCHEMA}))
    (tmp_path / "picks.json").write_text(json.dumps({"metric": "rougeL", "held_out": held, "reported": reported}))
    write_manifest(tmp_path, Manifest(step="evaluation", files=describe_files(tmp_path)))
    return tmp_path


def test_the_threshold_is_chosen_held_out_and_tried_on_what_is_reported(report: Path) -> None:
    found = threshold(report, precision=1.0, good=0.5)
    assert found is not None
    assert found.threshold == 0.5
    assert found.held_out_precision == 1.0
    assert found.coverage == pytest.approx(5 / 9)
    assert found.precision == pytest.approx(4 / 5)
    expected = binomtest(4, 5).proportion_ci(method="exact")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.02)
    assert "over 5 groups, so what you ask for is not proven" in sentence(found, precision=1.0, good=0.5)


def test_picks_of_one_group_prove_as_much_as_one_of_them(report: Path) -> None:
    def proven(copies: int) -> tuple[float | None, float | None]:
        values = json.loads((report / "picks.json").read_text())
        picks = [pick for pick in values["reported"] for _ in range(copies)]
        (report / "picks.json").write_text(json.dumps({**values, "reported": picks}))
        found = threshold(report, precision=1.0, good=0.5)
        assert found is not None
        assert (found.groups, found.precision) == (5, pytest.approx(4 / 5))
        return found.low, found.high

    assert proven(1) == pytest.approx(proven(4), abs=0.02)


def test_picks_without_groups_are_refused(report: Path) -> None:
    (report / "picks.json").write_text(json.dumps({"held_out": [[0.5, 1.0]], "reported": [[0.5, 1.0]]}))
    with pytest.raises(FolderError, match="which group.*evaluate again"):
        threshold(report, precision=0.9, good=0.5)


def test_a_precision_that_no_score_has_is_said(report: Path) -> None:
    assert threshold(report, precision=1.0, good=1.1) is None
    assert "No score keeps" in sentence(None, precision=1.0, good=1.1)


def test_a_cross_fitted_report_has_no_threshold(report: Path) -> None:
    (report / "report.json").write_text(json.dumps({"schema": SCHEMA, "folds": 5}))
    with pytest.raises(FolderError, match="is cross-fitted"):
        threshold(report, precision=0.9, good=0.5)


def test_a_report_without_held_out_picks_is_refused(report: Path) -> None:
    (report / "picks.json").write_text(json.dumps({"held_out": [], "reported": [[0.5, 1.0]]}))
    with pytest.raises(FolderError, match="no held-out picks.*validation split"):
        threshold(report, precision=0.9, good=0.5)
