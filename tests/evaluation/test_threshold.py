"""A threshold keeps the precision that it promises, with the confidence that it promises."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibrations import straight
from scipy.stats import binomtest
from wording import assert_names, raises_naming

from cappy.errors import FolderError
from cappy.evaluation.findings import SCHEMA
from cappy.evaluation.threshold import describe_threshold, find_lowest, find_threshold, groups_needed, lower_bound
from cappy.records import Manifest
from cappy.records.folder import describe_files, write_manifest


def apart(number: int) -> np.ndarray:
    """As many groups as picks."""
    return np.array([str(index) for index in range(number)])


def luckiest(scores: np.ndarray, good: np.ndarray, precision: float) -> float | None:
    """The lowest score whose held-out picks happen to be good enough."""
    order = np.argsort(-scores)
    enough = np.flatnonzero(np.cumsum(good[order]) / np.arange(1, len(order) + 1) >= precision)
    return float(scores[order][enough[-1]]) if len(enough) else None


def kept(least: float, worth: float, slope: float) -> float:
    """The precision at and above a threshold, of scores uniform in 0 to 1 that are good with worth + slope * score."""
    return worth + slope * (1 + least) / 2


@pytest.mark.parametrize(("worth", "slope"), [(0.3, 0.6), (0.65, 0.15), (0.7, 0.0)])
@pytest.mark.parametrize("number", [60, 300])
def test_a_promised_precision_is_kept_in_19_of_20_cases_and_the_luckiest_threshold_is_not(
    number: int, worth: float, slope: float
) -> None:
    """The precision of every threshold is known here, so a broken promise is not the chance of a small test split."""
    rng = np.random.default_rng(0)
    broken, lucky, wanted = 0, 0, 0.75
    for _ in range(400):
        scores = rng.random(number)
        good = rng.random(number) < worth + slope * scores
        result, other = find_lowest(scores, good, apart(number), wanted), luckiest(scores, good, wanted)
        broken += result is not None and kept(result, worth, slope) < wanted
        lucky += other is not None and kept(other, worth, slope) < wanted
    assert broken <= 400 * 0.05 + 13, "three standard errors"
    assert lucky > 400 * 0.3


def test_groups_whose_picks_are_alike_break_no_promise() -> None:
    rng = np.random.default_rng(1)
    broken = 0
    groups = np.repeat(apart(60), 5)
    for _ in range(200):
        scores = rng.random(300)
        good = np.repeat(rng.random(60) < 0.7, 5)
        broken += find_lowest(scores, good, groups, 0.75) is not None
    assert broken <= 200 * 0.05 + 9


def test_more_picks_promise_more() -> None:
    def share(number: int) -> float:
        rng = np.random.default_rng(2)
        result = []
        for _ in range(50):
            scores = rng.random(number)
            least = find_lowest(scores, rng.random(number) < 0.4 + 0.6 * scores, apart(number), 0.75)
            result.append(0.0 if least is None else float((scores >= least).mean()))
        return float(np.mean(result))

    assert share(60) < share(240) < share(1200)


def test_the_threshold_is_the_last_that_passes_before_one_fails() -> None:
    scores = np.arange(200, dtype=float)
    good = scores >= 100
    assert find_lowest(scores, good, apart(200), 0.9) is not None
    assert 85 <= (find_lowest(scores, good, apart(200), 0.9) or 0) <= 105
    assert find_lowest(scores, good, apart(200), 0.0) == 0.0
    assert find_lowest(scores, ~good, apart(200), 0.1) is None
    assert find_lowest(scores, np.ones(200, dtype=bool), apart(200), 1.0) is None, (
        "no number of picks shows that all are good"
    )


def test_which_scores_are_tested_does_not_depend_on_which_picks_are_good() -> None:
    """A pick that turns good never raises the threshold."""
    rng = np.random.default_rng(3)
    scores = rng.random(120)
    good = rng.random(120) < 0.4 + 0.6 * scores
    before = find_lowest(scores, good, apart(120), 0.7)
    for index in np.flatnonzero(~good)[:20]:
        better = good.copy()
        better[index] = True
        after = find_lowest(scores, better, apart(120), 0.7)
        assert after is not None
        assert before is None or after <= before


def test_picks_of_equal_score_are_kept_together() -> None:
    scores = np.repeat([0.9, 0.5, 0.1], 60)
    good = np.repeat([True, True, False], 60)
    assert find_lowest(scores, good, apart(180), 0.9) == 0.5
    good[90:120] = False
    assert find_lowest(scores, good, apart(180), 0.9) == 0.9


def test_the_bound_is_clopper_and_pearsons_where_every_pick_is_a_group() -> None:
    for good, number in ((0, 5), (29, 29), (37, 40), (3, 50)):
        flags = np.arange(number) < good
        expected = binomtest(good, number, alternative="greater").proportion_ci(0.95, method="exact").low
        assert lower_bound(flags, apart(number), 0.95) == pytest.approx(expected)


def test_picks_that_are_alike_within_groups_prove_as_much_as_one_of_each() -> None:
    flags = np.arange(40) < 36
    single = lower_bound(flags, apart(40), 0.95)
    copied = lower_bound(np.repeat(flags, 5), np.repeat(apart(40), 5), 0.95)
    assert single - 0.02 < copied <= single
    assert lower_bound(np.ones(200, dtype=bool), np.repeat(apart(40), 5), 0.95) == pytest.approx(0.05 ** (1 / 40))


def test_how_many_groups_a_precision_takes() -> None:
    assert groups_needed(0.9, 0.95) == 29
    assert 0.05 ** (1 / 29) >= 0.9 > 0.05 ** (1 / 28)
    assert groups_needed(0.9, 0.95, bad=1) == 46
    assert groups_needed(0.5, 0.5) == 1
    assert groups_needed(1.0, 0.95) is None


def write(folder: Path, values: dict[str, Any], **more: Any) -> Path:
    """A report with these picks."""
    (folder / "report.json").write_text(json.dumps({"schema": SCHEMA, **more}))
    (folder / "picks.json").write_text(json.dumps({"metric": "rougeL", **values}))
    write_manifest(folder, Manifest(step="evaluation", files=describe_files(folder)))
    return folder


HELD = [(index / 100, float(index >= 50), str(index), 4) for index in range(100)]
REPORTED = [(0.1 + index / 10, float(index >= 4 and index != 6), str(index), 4) for index in range(9)]


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """100 held-out picks, good from 0.5 on, and 9 reported ones, one bad above it; each is of a group of its own."""
    return write(tmp_path, {"held_out": HELD, "reported": REPORTED})


def test_the_threshold_is_chosen_held_out_and_tried_on_what_is_reported(report: Path) -> None:
    result = find_threshold(report, precision=0.8, good=0.5)
    assert result is not None
    assert 0.45 <= result.threshold <= 0.52
    own = [label for score, label, *_ in HELD if score >= result.threshold]
    assert result.held_out_precision == pytest.approx(np.mean(own))
    assert 0.8 <= result.held_out_low < result.held_out_precision
    assert result.coverage == pytest.approx(5 / 9)
    assert result.precision == pytest.approx(4 / 5)
    expected = binomtest(4, 5).proportion_ci(method="exact")
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high), abs=0.02)
    text = describe_threshold(result, precision=0.8, good=0.5)
    assert_names(text, f"at least {100 * result.held_out_low:.1f}%", "95% confidence", "5 groups", "do not confirm")
    assert result.floor is None
    assert "--floor" not in text


def test_a_calibrated_report_says_which_floor_a_gateway_needs(report: Path) -> None:
    (report / "calibration.json").write_text(straight({1: 1.0, 4: 0.5}).to_json())
    result = find_threshold(report, precision=0.8, good=0.5)
    assert result is not None
    assert result.floor == pytest.approx(result.threshold / 2)
    assert f"--floor {result.floor:.6g}" in describe_threshold(result, precision=0.8, good=0.5)


def test_more_confidence_asks_for_a_higher_threshold(report: Path) -> None:
    least = [find_threshold(report, precision=0.8, good=0.5, confidence=value) for value in (0.6, 0.95, 0.999)]
    values = [result.threshold for result in least if result is not None]
    assert len(values) == 3
    assert values == sorted(values)
    assert values[0] < values[-1]


def test_reported_picks_of_one_group_prove_as_much_as_one_of_them(report: Path) -> None:
    def proven(copies: int) -> tuple[float | None, float | None]:
        write(report, {"held_out": HELD, "reported": [pick for pick in REPORTED for _ in range(copies)]})
        result = find_threshold(report, precision=0.8, good=0.5)
        assert result is not None
        assert (result.groups, result.precision) == (5, pytest.approx(4 / 5))
        return result.low, result.high

    assert proven(1) == pytest.approx(proven(4), abs=0.02)


def test_a_precision_that_no_score_has_is_said_with_what_it_takes(report: Path) -> None:
    assert find_threshold(report, precision=0.9, good=1.1) is None
    text = describe_threshold(None, precision=0.9, good=1.1)
    assert_names(text, "No threshold", "95%", "90%", "29 groups")
    assert_names(describe_threshold(None, precision=1.0, good=0.5), "No threshold", "100%", "no number")


def folded(shift: float) -> list[tuple[float, float, str, int, int]]:
    """200 picks of four folds, good from 0.5 on; the scorer of the last fold scores by `shift` more."""
    rows = []
    for index in range(200):
        fold, score = index % 4 + 1, index / 200
        rows.append((score + shift * (fold == 4), float(score >= 0.5), str(index), 4, fold))
    return rows


def test_a_cross_fitted_threshold_is_kept_by_picks_of_folds_that_did_not_choose_it(tmp_path: Path) -> None:
    result = find_threshold(write(tmp_path, {"out_of_fold": folded(0.0)}, folds=4), precision=0.8, good=0.5)
    assert result is not None
    assert (result.folds, result.held_out, result.reported) == (4, 200, 200)
    assert 0.4 < result.threshold <= 0.52
    assert result.precision is not None
    assert result.precision >= 0.8
    assert_names(describe_threshold(result, precision=0.8, good=0.5), "the other 3 folds", "scale")


def test_folds_on_other_scales_are_seen_in_what_is_kept(tmp_path: Path) -> None:
    alike = find_threshold(write(tmp_path, {"out_of_fold": folded(0.0)}, folds=4), precision=0.8, good=0.5)
    shifted = find_threshold(write(tmp_path, {"out_of_fold": folded(0.5)}, folds=4), precision=0.8, good=0.5)
    assert alike is not None
    assert shifted is not None
    assert alike.precision is not None
    assert shifted.precision is not None
    assert shifted.precision < alike.precision - 0.05


@pytest.mark.parametrize(
    ("values", "folds", "named"),
    [
        ({"held_out": [], "reported": REPORTED}, 0, ("held-out", "validation split")),
        ({"held_out": [[0.5, 1.0, "a"]], "reported": [[0.5, 1.0, "a"]]}, 0, ("older version", "evaluate again")),
        ({"held_out": [[0.5, None, "a", 1]], "reported": REPORTED}, 0, ("score, label, group", "evaluate again")),
        (
            {"held_out": [[0.5, float("nan"), "a", 1]], "reported": REPORTED},
            0,
            ("score, label, group", "evaluate again"),
        ),
        ({"held_out": [[0.5, 1.0, "a", 0]], "reported": REPORTED}, 0, ("score, label, group", "evaluate again")),
        ({"held_out": HELD}, 0, ("score, label, group", "evaluate again")),
        ({"held_out": HELD, "reported": REPORTED}, 5, ("out-of-fold", "evaluate again")),
        ({"out_of_fold": HELD}, 5, ("score, label, group", "evaluate again")),
    ],
)
def test_picks_that_say_too_little_are_refused(
    tmp_path: Path, values: dict[str, Any], folds: int, named: tuple[str, ...]
) -> None:
    with raises_naming(FolderError, "picks.json", *named):
        find_threshold(write(tmp_path, values, folds=folds), precision=0.8, good=0.5)
