"""The report says in words what its numbers say, and shows texts as texts."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from differences import difference
from pydantic import TypeAdapter
from wording import assert_names

from cappy.errors import RecordError
from cappy.evaluation import Difference, Report, evaluate, page
from cappy.evaluation.findings import SCHEMA
from cappy.evaluation.statistics import adjust_p_values
from cappy.evaluation.verdict import verdict
from cappy.records import Instance

Score = Callable[[Sequence[tuple[str, str]]], list[float]]


@pytest.fixture
def report(instances: list[Instance], score: Score) -> Report:
    return evaluate(instances, score=score, champion=score)


def judged(report: Report, **bounds: tuple[float, float]) -> Report:
    """The report with these intervals of the selector's difference to others."""
    values = {f"selector-{other}": difference(ends[0], sum(ends) / 2) for other, ends in bounds.items()}
    made = TypeAdapter(dict[str, Difference]).validate_python(values)
    return replace(report, comparisons=made)


def test_a_report_goes_to_json_and_back(report: Report) -> None:
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert Report.from_dict(json.loads(text)) == report


def test_what_is_no_report_is_refused_with_the_field(report: Report) -> None:
    with pytest.raises(RecordError, match="metric"):
        Report.from_dict({"schema": SCHEMA})
    values: Any = report.to_dict()
    values["selectors"]["scorer"]["estimate"]["mean"] = "high"
    with pytest.raises(RecordError, match=r"selectors\.scorer\.estimate\.mean.*'high'"):
        Report.from_dict(values)


def test_a_field_of_a_later_version_is_passed_over(report: Report) -> None:
    assert Report.from_dict({**report.to_dict(), "colour": {}}) == report


@pytest.mark.parametrize(
    ("schema", "remedy"), [(SCHEMA + 1, "update cappy"), (SCHEMA - 1, "evaluate again"), ("two", "update cappy")]
)
def test_a_report_of_another_schema_is_refused(report: Report, schema: object, remedy: str) -> None:
    with pytest.raises(RecordError, match=rf"schema.*{remedy}"):
        Report.from_dict({**report.to_dict(), "schema": schema})


def test_the_headline_tells_apart_better_open_and_worse(report: Report) -> None:
    result = verdict(judged(report, random=(0.01, 0.03), likelihood=(-0.01, 0.02), mbr=(-0.04, -0.02)))
    better, not_shown, worse = result[0].split(";")
    assert_names(better, "beats random choice")
    assert_names(not_shown, "not shown", "the likelihood")
    assert_names(worse, "does not", "MBR")
    assert any("worse" in sentence and "MBR" in sentence for sentence in result)


def test_what_it_does_not_beat_is_joined_by_or(report: Report) -> None:
    result = verdict(judged(report, random=(-0.03, -0.01), mbr=(-0.04, -0.02)))
    assert_names(result[0], "does not", "random choice or MBR")


def test_the_same_picks_are_called_the_same(report: Report) -> None:
    assert_names(verdict(judged(report, champion=(0.0, 0.0)))[1], "exactly as well", "the champion")


def test_an_interval_that_touches_zero_is_no_win(report: Report) -> None:
    assert_names(verdict(judged(report, mbr=(0.0, 0.04)))[0], "not shown", "MBR")


def test_comparisons_that_do_not_survive_holms_correction_are_named_as_a_person_reads_them(report: Report) -> None:
    """Both have a p-value of 0.01, and there are more than ten others with less."""
    weak = ("scorer-mbr", "selector-likelihood")
    made = {
        key: replace(value, difference=0.02, low=0.01, high=0.03, p_value=0.03 if key in weak else 1e-6)
        for key, value in report.comparisons.items()
    }
    adjusted = adjust_p_values({key: value.p_value for key, value in made.items()})
    sentences = [one for one in verdict(replace(report, comparisons=made, adjusted=adjusted)) if "Holm" in one]
    (sentence,) = sentences
    assert_names(sentence, f"{len(made)} comparisons", "selector against better likelihood", "score alone against MBR")


def test_a_leak_is_said_in_words(report: Report) -> None:
    leaking = replace(report, leaks={"challenger": 3, "champion": 0})
    cautions = [sentence for sentence in verdict(leaking) if "trained on" in sentence]
    (caution,) = cautions
    assert_names(caution, "Caution", "challenger", "3 of the 40")


def test_the_verdict_without_a_scorer_is_about_mbr(instances: list[Instance]) -> None:
    assert_names(verdict(evaluate(instances, score=None))[0], "no scorer", "MBR")


def test_the_table_has_the_selectors_that_a_person_compares(report: Report) -> None:
    header, *rows = report.table()
    assert header[:2] == ("selector", "Rouge-L x100")
    names = [row[0] for row in rows]
    assert [name for name in names if name.startswith("likelihood")] == [names[3]]
    shown = [name.split(" (")[0] for name in (*names[:3], *names[4:])]
    expected = "random choice, longest, best single system, MBR, score alone, champion, selector, texts only, selector"
    assert ", ".join(name for name in shown if name in expected) == expected
    assert shown[-1] == "oracle"
    assert not {"first response", "shortest"} & {*shown}
    assert rows[0][1] == f"{100 * report.selectors['random'].estimate.mean:.1f}"
    assert verdict(report)[0] in report.text()


def test_texts_of_the_data_cannot_become_markup(instances: list[Instance]) -> None:
    attack = "<script>alert(1)</script>"
    hostile = [
        replace(
            i,
            instance_id=attack + i.instance_id,
            task=attack,
            instruction=attack + i.instruction,
            references=(attack,),
            candidates=tuple(replace(c, response=attack + c.response, generator=attack) for c in i.candidates),
        )
        for i in instances
    ]
    html = page.render(replace(evaluate(hostile, score=None), versions={"challenger": attack}))
    assert html.count("<script") == 1  # the page's own, which sorts
    assert html.count("&lt;script&gt;alert(1)") > 40


def test_the_page_needs_nothing_from_elsewhere(report: Report) -> None:
    html = page.render(report)
    assert not re.search(r"(src|href)=.(?!#)", html.replace('xlink:href="#', "").replace('href="#', ""))
    assert "url(http" not in html
    assert "@import" not in html
    assert html.count("<svg") == 4


def test_the_plot_takes_its_colours_from_the_page(report: Report) -> None:
    html = page.render(report)
    drawn = html[html.index("<svg") :]
    assert "var(--selector)" in drawn
    assert "#1d5fd0" not in drawn


def test_equal_reports_make_equal_pages(report: Report) -> None:
    assert page.render(report) == page.render(Report.from_dict(report.to_dict()))


def test_the_page_says_what_was_not_available(instances: list[Instance]) -> None:
    html = page.render(evaluate(instances, score=None))
    assert re.search(r"no selector.*none was given", html)


def test_labels_that_users_brought_need_no_reference(instances: list[Instance], score: Score) -> None:
    rated = [
        replace(
            instance,
            references=(),
            candidates=tuple(one.with_label("given", one.labels["rougeL"]) for one in instance.candidates),
        )
        for instance in instances
    ]
    report = evaluate(rated, score=score, metric="given")
    assert report.selectors["oracle"].estimate == evaluate(instances, score=score).selectors["oracle"].estimate
    assert "labels were given with" in page.render(report)
