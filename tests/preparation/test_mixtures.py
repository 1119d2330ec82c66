"""The mixtures count as published, name where their data lies, and print so that a person can read it."""

import csv
import json
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wording import assert_names, raises_naming

from cappy.errors import ConfigError
from cappy.preparation.mixtures import CONVERTED_BRANCH, NAMES, Mixture, Subset, TemplateFacts, from_json, load_mixture
from cappy.preparation.mixtures.__main__ import count_choices, make_mixture, write_mixtures
from cappy.preparation.mixtures.plan import cap_rows, plan_mixture, to_json, to_text

SHARED = Path(__file__).parents[2].parent / "shared/data"
TEMPLATES, PUBLISHED = SHARED / "templates/templates", SHARED / "published"
DATA = files("cappy.preparation.mixtures") / "data"

needs_shared = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="shared/data is not beside this checkout")

T0 = {  # dataset: source rows, templates, with choices, prompted examples after the cap
    "glue/mrpc": (3_668, 7, 5, 25_676),
    "glue/qqp": (363_846, 6, 6, 2_183_076),
    "duorc/ParaphraseRC": (69_524, 9, 0, 625_716),
    "cosmos_qa": (25_262, 13, 12, 328_406),
    "wiki_hop/original": (43_738, 9, 5, 393_642),
    "wiqa": (29_808, 8, 0, 238_464),
    "amazon_polarity": (3_600_000, 9, 9, 499_995),
    "app_reviews": (288_065, 4, 2, 1_152_260),
    "yelp_review_full": (650_000, 7, 7, 499_996),
    "wiki_bio": (582_659, 5, 0, 500_000),
    "cnn_dailymail/3.0.0": (287_113, 9, 0, 2_584_017),
    "gigaword": (3_803_957, 9, 0, 499_995),
    "xsum": (204_045, 10, 0, 2_040_450),
    "dbpedia_14": (560_000, 4, 4, 500_000),
    "trec": (5_452, 18, 18, 98_136),
}

HELDOUT = {  # task: split, its rows, templates, with choices
    "anli/r1": ("test_r1", 1000, 15, 15),
    "anli/r2": ("test_r2", 1000, 15, 15),
    "anli/r3": ("test_r3", 1200, 15, 15),
    "super_glue/cb": ("validation", 56, 15, 15),
    "super_glue/rte": ("validation", 277, 10, 10),
    "story_cloze/2016": ("validation", 1871, 6, 6),
    "super_glue/wsc.fixed": ("validation", 104, 10, 10),
    "super_glue/wic": ("validation", 638, 10, 10),
    "winogrande/winogrande_xl": ("validation", 1267, 6, 6),
    "super_glue/axg": ("test", 356, 10, 10),
    "crows_pairs": ("test", 1508, 8, 6),
    "super_glue/copa": ("validation", 100, 12, 12),
    "hellaswag": ("validation", 10_042, 11, 8),
}

sizes = st.integers(min_value=0, max_value=5_000_000)
counts = st.integers(min_value=1, max_value=20)


def subset(*, rows: dict[str, int | None], choices: tuple[float | None, ...] = ()) -> Subset:
    templates = tuple(
        TemplateFacts(name=f"template {index}", num_choices=number, original_task=True)
        for index, number in enumerate(choices)
    )
    return Subset(
        name="a",
        dataset="a",
        repository="org/a",
        configuration="first",
        revision="main",
        rows=rows,
        verified=True,
        templates=templates,
    )


def mixture(*subsets: Subset, samples: int) -> Mixture:
    return Mixture(name="heldout", template_version="", samples=samples, subsets=subsets)


def test_t0_has_the_published_subsets_and_templates() -> None:
    subsets = load_mixture("t0").subsets
    templates = [template for subset in subsets for template in subset.templates]
    assert len({subset.name for subset in subsets}) == len(subsets) == 38
    assert len(templates) == 313
    assert sum(template.has_choices for template in templates) == 164
    assert all(subset.splits == ("train",) for subset in subsets)


def test_t0_prompts_as_many_examples_of_each_dataset_as_published() -> None:
    t0 = load_mixture("t0")
    planned = plan_mixture(t0)
    result = {
        subset.name: (
            subset.rows["train"],
            len(subset.templates),
            sum(template.has_choices for template in subset.templates),
            sum(row.examples or 0 for row in planned.rows if row.subset == subset.name),
        )
        for subset in t0.subsets
    }
    assert {name: result[name] for name in T0} == T0
    assert planned.examples() == 17_277_798
    assert planned.examples("choices") == 7_268_684
    assert planned.examples("open-ended") == 10_009_114


def test_t0_makes_the_pairs_of_the_reconstruction() -> None:
    planned = plan_mixture(load_mixture("t0"))
    assert planned.pairs("open-ended") == 12 * 10_009_114
    assert (round(planned.pairs("choices") / 1e6, 1), round(planned.pairs() / 1e6, 1)) == (31.7, 151.8)


def test_heldout_has_the_published_tasks_sizes_and_template_counts() -> None:
    result = {
        subset.name: (
            *next(iter(subset.rows.items())),
            len(subset.templates),
            sum(template.has_choices for template in subset.templates),
        )
        for subset in load_mixture("heldout").subsets
    }
    assert result == HELDOUT


def test_bigbench45_has_45_tasks_without_templates_one_of_unknown_size() -> None:
    bigbench = load_mixture("bigbench45")
    assert len({subset.name for subset in bigbench.subsets}) == len(bigbench.subsets) == 45
    assert all(subset.configuration == subset.name and not subset.templates for subset in bigbench.subsets)
    assert plan_mixture(bigbench).unknown == ("tellmewhy",)


@needs_shared
def test_bigbench45_sizes_equal_the_published_table() -> None:
    with (PUBLISHED / "bigbench45_sizes_and_scores.csv").open(newline="") as file:
        published = {
            row["task"]: {split: int(row[split]) if row[split] else None for split in ("train", "validation")}
            for row in csv.DictReader(file)
        }
    assert {subset.name: dict(subset.rows) for subset in load_mixture("bigbench45").subsets} == published


@needs_shared
@pytest.mark.parametrize("name", NAMES)
def test_the_packaged_files_are_what_the_script_writes(name: str, tmp_path: Path) -> None:
    write_mixtures(TEMPLATES, PUBLISHED, tmp_path)
    assert (tmp_path / f"{name}.json").read_text() == (DATA / f"{name}.json").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_the_packaged_files_agree_with_the_sources_written_by_hand(name: str) -> None:
    sources = {source["name"]: source for source in json.loads((DATA / "sources.json").read_text())[name]}
    for subset in load_mixture(name).subsets:
        source = sources.get(subset.name) or {**sources["{task}"], "configuration": subset.name}
        for field in ("repository", "configuration", "revision", "manual", "notes", "choices_source", "verified"):
            assert getattr(subset, field) == source.get(field, ""), (subset.name, field)


@pytest.mark.parametrize("name", NAMES)
def test_every_subset_says_where_its_data_lies_and_that_nobody_loaded_it(name: str) -> None:
    for subset in load_mixture(name).subsets:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", subset.repository)
        assert subset.revision in ("main", CONVERTED_BRANCH)
        assert subset.evidence
        assert subset.verified is False
        assert re.fullmatch(r"([0-9a-f]{40})?", subset.pinned_commit)


def test_what_must_be_obtained_by_hand_says_how_and_where() -> None:
    by_hand = [subset for name in NAMES for subset in load_mixture(name).subsets if subset.manual]
    assert [subset.name for subset in by_hand] == ["story_cloze/2016"]
    assert "https://" in by_hand[0].manual


def test_choices_that_differ_by_row_name_their_source() -> None:
    named = [subset.name for name in NAMES for subset in load_mixture(name).subsets if subset.choices_source]
    joined = ["cos_e/v1.11", "dream", "qasc", "quail", "quartz", "wiki_hop/original", "wiqa", "hellaswag"]
    assert named == joined


def test_the_data_files_are_small() -> None:
    assert sum(len((DATA / f"{name}.json").read_bytes()) for name in (*NAMES, "sources")) < 200_000


def test_an_unknown_mixture_is_refused_with_the_names_there_are() -> None:
    with raises_naming(ConfigError, "'p3'", "t0, heldout, bigbench45"):
        load_mixture("p3")


def test_a_file_that_lacks_a_field_or_has_another_type_is_not_a_mixture() -> None:
    values = json.loads((DATA / "t0.json").read_text())
    del values["samples"]
    with pytest.raises(ValueError, match="samples"):
        from_json(json.dumps(values))
    with pytest.raises(ValueError, match="samples"):
        from_json(json.dumps({**values, "samples": "10"}))


@given(sizes, counts)
def test_a_dataset_above_the_limit_is_shared_out_evenly_and_any_other_kept_whole(num_rows: int, templates: int) -> None:
    each = cap_rows(num_rows, templates)
    if num_rows <= 500_000:
        assert each == num_rows
    else:
        assert 500_000 - templates < each * templates <= 500_000


@given(sizes, st.integers(min_value=0, max_value=20), st.lists(st.none() | counts, min_size=1, max_size=6))
def test_a_training_example_makes_a_pair_of_each_choice_or_of_each_response(
    num_rows: int, samples: int, choices: list[int | None]
) -> None:
    planned = plan_mixture(mixture(subset(rows={"train": num_rows}, choices=tuple(choices)), samples=samples))
    each = cap_rows(num_rows, len(choices))
    assert [row.examples for row in planned.rows] == [each] * len(choices)
    assert [row.pairs for row in planned.rows] == [each * (number or samples + 2) for number in choices]
    assert planned.pairs() == planned.pairs("choices") + planned.pairs("open-ended")


def test_an_evaluation_split_is_never_capped_and_has_no_mismatches() -> None:
    planned = plan_mixture(mixture(subset(rows={"validation": 600_000}, choices=(4, None)), samples=0))
    assert [(row.examples, row.pairs) for row in planned.rows] == [(600_000, 2_400_000), (600_000, 0)]


def test_unknown_sizes_count_for_nothing_and_are_named() -> None:
    planned = plan_mixture(mixture(subset(rows={"train": 10, "validation": None}), samples=1))
    assert (planned.examples(), planned.pairs(), planned.unknown) == (10, 30, ("a",))


@pytest.mark.parametrize(
    ("answer_choices", "expected"),
    [
        (None, None),
        ("", None),
        ("yes ||| no", 2),
        ("{{answer0}} ||| {{answer1}} ||| {{answer2}}", 3),
        ('{{choices.text | join("|||")}}', 7.5),
        ('{{ endings | join(" ||| ") }}', 7.5),
    ],
)
def test_choices_are_counted_where_they_are_written_out(answer_choices: str | None, expected: float | None) -> None:
    assert count_choices(answer_choices, per_row=7.5) == expected


def test_choices_that_differ_by_row_need_a_number() -> None:
    with raises_naming(ConfigError, "{{choices", "choices_per_row", "sources.json"):
        count_choices('{{choices | join("|||")}}', per_row=None)


@pytest.mark.parametrize("by_template", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_text_fits_100_columns_and_is_plain(name: str, by_template: bool) -> None:
    for line in to_text(load_mixture(name), by_template=by_template).splitlines():
        assert len(line) <= 100
        assert line == line.rstrip()
        assert line.isprintable()


def test_the_text_has_a_line_for_each_dataset_the_sums_and_what_to_know() -> None:
    lines = to_text(load_mixture("t0")).splitlines()
    names = {line.split()[0] for line in lines if line}
    assert {subset.name for subset in load_mixture("t0").subsets} <= names
    assert "total 313 164 149 17,277,798 151,781,384".split() in [line.split() for line in lines]
    flowing = " ".join(lines)
    assert_names(flowing, "promptsource 0.1.0", "151.8 million pairs", "160 million", "38 of 38 hub addresses")


def test_the_text_by_template_has_a_line_for_each_template() -> None:
    t0 = load_mixture("t0")
    lines = to_text(t0, by_template=True).splitlines()
    assert sum(line.startswith("  ") for line in lines) == 313
    assert "  same thing" in {line[:12] for line in lines}


def test_the_text_says_what_to_obtain_by_hand_and_what_has_no_size() -> None:
    assert re.search(r"by hand: story_cloze/2016\b.*https://", " ".join(to_text(load_mixture("heldout")).splitlines()))
    assert re.search(r"^Size unknown.*: tellmewhy\b", to_text(load_mixture("bigbench45")), re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_the_json_has_the_sums_of_its_own_rows(name: str) -> None:
    values = json.loads(to_json(load_mixture(name)))
    rows = [row for subset in values["subsets"] for row in subset["plan"]]
    assert sum(row["examples"] or 0 for row in rows) == values["totals"]["examples"]
    assert sum(row["pairs"] or 0 for row in rows) == values["totals"]["pairs"]
    assert all(subset["verified"] is False for subset in values["subsets"])


@needs_shared
def test_a_missing_folder_is_named_with_the_remedy(tmp_path: Path) -> None:
    with raises_naming(ConfigError, "templates.yaml", "is missing", "--templates"):
        make_mixture("t0", tmp_path, PUBLISHED)


def test_the_script_ends_with_one_line_where_a_folder_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cappy.preparation.mixtures", "--target", str(tmp_path)]
    command += ["--templates", str(tmp_path), "--published", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert_names(done.stderr, f"{tmp_path}/t0_datasets.csv", "is missing", "--published")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
