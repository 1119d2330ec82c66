"""Templates over datasets: many prompts a row, one group a row, nothing shared between splits, the same in shards."""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wording import assert_names, raises_naming

from cappy.annotation.step import AnnotationConfig
from cappy.annotation.step import run as annotation
from cappy.errors import ConfigError, FolderError, RecordError
from cappy.preparation.mixtures.plan import cap_rows
from cappy.preparation.prompt_sources import _is_sampled
from cappy.preparation.step import PreparationConfig, run
from cappy.records import Instance, Manifest, prompt_hash, read, write
from cappy.sampling.step import SamplingConfig
from cappy.sampling.step import run as sampling

Prepare = Callable[..., tuple[Manifest, list[Instance]]]
SHARED = Path(__file__).parents[2].parent / "shared/data"

YAML = """dataset: quiz
templates:
  1: !Template
    answer_choices: Yes ||| No
    id: '1'
    jinja: '{{question}} Yes or no? ||| {% if label >= 0 %}{{ answer_choices[label] }}{% endif %}'
    metadata: !TemplateMetadata
      choices_in_prompt: true
      metrics: [Accuracy]
      original_task: true
    name: ask
    reference: ''
  2: !Template
    answer_choices: null
    id: '2'
    jinja: 'Ask about {{topic}}. ||| {{question}}'
    metadata: !TemplateMetadata
      choices_in_prompt: false
      metrics: [ROUGE]
      original_task: false
    name: write a question
    reference: ''
"""


@pytest.fixture
def templates(tmp_path: Path) -> Path:
    folder = tmp_path / "templates"
    (folder / "quiz").mkdir(parents=True)
    (folder / "quiz/templates.yaml").write_text(YAML)
    return folder


def quiz(count: int, topics: int = 1000) -> list[dict[str, Any]]:
    return [{"question": f"Is {n} even?", "topic": f"number {n % topics}", "label": n % 2} for n in range(count)]


def test_a_row_makes_one_prompt_per_template_and_is_one_group(
    prepare: Prepare, json_lines: Any, templates: Path
) -> None:
    path = json_lines(*quiz(1))
    manifest, (asked, written) = prepare(path, templates=templates, dataset="quiz", test=0, validation=0)
    assert (asked.instruction, asked.references, asked.choices) == ("Is 0 even? Yes or no?", ("Yes",), ("Yes", "No"))
    assert [candidate.response for candidate in asked.candidates] == ["Yes", "No"]
    assert (written.instruction, written.references, written.choices) == ("Ask about number 0.", ("Is 0 even?",), ())
    assert (asked.template, asked.original_task, asked.task) == ("ask", True, "quiz")
    assert (written.template, written.original_task) == ("write a question", False)
    assert asked.group_id == written.group_id
    assert asked.instance_id != written.instance_id
    assert {"data.jsonl", "templates of quiz"} == set(manifest.facts["made_of"])


def test_splits_cut_no_group_and_share_no_prompt(prepare: Prepare, json_lines: Any, templates: Path) -> None:
    # Five topics: the second template gives the same prompt for many rows.
    path = json_lines(*quiz(200, topics=5), *quiz(3))
    manifest, result = prepare(path, templates=templates, dataset="quiz", test=0.2, validation=0.2)
    splits_of_group, splits_of_prompt = defaultdict(set), defaultdict(set)
    for instance in result:
        splits_of_group[instance.group_id].add(instance.split)
        splits_of_prompt[prompt_hash(instance.instruction)].add(instance.split)
    assert {len(splits) for splits in chain(splits_of_group.values(), splits_of_prompt.values())} == {1}
    assert {instance.split for instance in result} == {"train", "validation", "test"}
    assert manifest.metrics["dropped_shared_with_held_out"] == 2 * 203 - len(result) > 0


@pytest.mark.parametrize("count", [1, 3, 8])
def test_shards_make_the_instances_of_the_whole(
    prepare: Prepare, json_lines: Any, templates: Path, tmp_path: Path, count: int
) -> None:
    path = json_lines(*quiz(50, topics=7))
    known = {"templates": templates, "dataset": "quiz", "validation": 0.2}
    _, whole = prepare(path, **known)
    shards = [prepare(path, shard=f"{n}/{count}", target=tmp_path / f"shards/{n}", **known)[1] for n in range(count)]
    key = lambda instance: instance.instance_id  # noqa: E731
    assert sorted(chain.from_iterable(shards), key=key) == sorted(whole, key=key)
    # A folder of shards is a source: what was apart is joined, splits kept.
    _, joined = prepare(tmp_path / "shards")
    assert sorted(joined, key=key) == sorted(whole, key=key)


def test_the_same_inputs_give_the_same_bytes(prepare: Prepare, json_lines: Any, templates: Path) -> None:
    path = json_lines(*quiz(50))
    known = {"templates": templates, "dataset": "quiz", "shard": "1/3"}
    assert prepare(path, **known)[0] == prepare(path, **known)[0]
    assert prepare(path, **known)[0].hash != prepare(path, seed=1, **known)[0].hash


def test_a_template_that_fails_fails_the_run_above_the_threshold(
    prepare: Prepare, json_lines: Any, templates: Path, tmp_path: Path
) -> None:
    rows = [*quiz(9), {"question": "Odd?", "topic": "t", "label": "x"}]
    path = json_lines(*rows)
    known = {"templates": templates, "dataset": "quiz", "test": 0, "validation": 0}
    failed = (f"{path}:10: quiz: template 'ask'", "TypeError", "1 of 10 rows")
    with raises_naming(RecordError, *failed, "--template", "--max-failed"):
        prepare(path, target=tmp_path / "never", **known)
    assert not (tmp_path / "never").exists()
    manifest, result = prepare(path, max_failed=0.1, **known)
    assert Counter(instance.template for instance in result) == {"ask": 9, "write a question": 10}
    assert manifest.facts["failed_templates"]["quiz ask"]["rows"] == 1
    assert {instance.template for instance in prepare(path, template=["write*"], **known)[1]} == {"write a question"}


def test_a_template_that_never_works_is_refused_before_all_rows_are_read(
    prepare: Prepare, json_lines: Any, templates: Path
) -> None:
    path = json_lines(*[{"question": "?", "topic": "t"}] * 5_000)
    with raises_naming(RecordError, "100 of 100 rows"):
        prepare(path, templates=templates, dataset="quiz", missing="fail", max_failed=0.5)


def test_a_template_that_runs_out_of_time_row_after_row_is_refused_whatever_share_may_fail(
    prepare: Prepare, json_lines: Any, templates: Path
) -> None:
    file = templates / "quiz/templates.yaml"
    endless = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    file.write_text(YAML.replace("Yes or no?", f"Yes or no?{{% if label %}}{endless}{{% endif %}}"))
    known = {"templates": templates, "dataset": "quiz", "max_failed": 1.0, "test": 0, "validation": 0}
    path = json_lines(*[row | {"label": int(n in (3, 5, 6))} for n, row in enumerate(quiz(20))])
    assert prepare(path, **known)[0].facts["failed_templates"]["quiz ask"]["rows"] == 3
    with raises_naming(RecordError, "template 'ask'", "longer than 2 seconds", "3 consecutive rows", "--template"):
        prepare(json_lines(*[row | {"label": 1} for row in quiz(5_000)]), **known)


def test_missing_fields_are_holes_that_are_counted_or_failures(
    prepare: Prepare, json_lines: Any, templates: Path
) -> None:
    path = json_lines(*[{"question": f"{n}?", "label": 0} for n in range(3)])
    known = {"templates": templates, "dataset": "quiz", "test": 0, "validation": 0}
    manifest, result = prepare(path, **known)
    assert [instance.instruction for instance in result][1] == "Ask about ."
    assert manifest.metrics["with_missing_fields"] == 3
    assert_names(manifest.facts["missing_fields"]["quiz write a question"], "topic", "lacks")
    with raises_naming(RecordError, "data.jsonl:1: quiz", "'write a question'", "topic"):
        prepare(path, missing="fail", **known)


def test_blank_renders_are_dropped_and_counted(prepare: Prepare, json_lines: Any, templates: Path) -> None:
    path = json_lines({"question": "Is it?", "topic": "t", "label": -1})
    manifest, result = prepare(path, templates=templates, dataset="quiz", test=0, validation=0)
    assert [instance.template for instance in result] == ["write a question"]
    assert manifest.metrics["dropped_blank"] == 1


@given(st.integers(1, 3_000), st.integers(1, 60))
def test_a_cap_gives_each_template_its_share_evenly_spaced(num_rows: int, share: int) -> None:
    share = min(share, num_rows)
    for offset in (0, num_rows // 3, num_rows - 1):
        seen = [row for row in range(num_rows) if _is_sampled(row + offset, num_rows, share)]
        assert len(seen) == share
        gaps = {later - earlier for earlier, later in pairwise(seen)}
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_mixture_is_read_from_files_at_hand_with_its_cap_and_splits(
    templates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[cap_rows.__module__], "T0_ROW_LIMIT", 20)
    local = tmp_path / "local"
    local.mkdir()
    (templates / "rotten_tomatoes").mkdir()
    (templates / "rotten_tomatoes/templates.yaml").write_text(YAML.replace("quiz", "rotten_tomatoes"))
    rows = [{"question": f"Is {n}?", "topic": f"t{n}", "label": n % 2} for n in range(8_530)]
    (local / "rotten_tomatoes.train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(
        PreparationConfig(
            mixture="t0",
            subsets=("rotten_tomatoes",),
            local=local,
            templates=templates,
            target=tmp_path / "t0",
            work=tmp_path / "work",
            validation=0,
        )
    )
    result = list(read(tmp_path / "t0"))
    assert cap_rows(8_530, 2) == 10
    assert Counter(instance.template for instance in result) == {"ask": 10, "write a question": 10}
    assert {instance.split for instance in result} == {"train"}
    by_template = defaultdict(set)
    for instance in result:
        by_template[instance.template].add(instance.group_id)
    assert not by_template["ask"] & by_template["write a question"]


def test_held_out_mixtures_are_all_test(tmp_path: Path) -> None:
    if not SHARED.exists():
        pytest.skip("shared/data is not beside this checkout")
    local = tmp_path / "local"
    local.mkdir()
    (local / "super_glue_cb.validation.jsonl.gz").symlink_to(SHARED / "heldout_tasks/super_glue_cb.validation.jsonl.gz")
    manifest = run(
        PreparationConfig(
            mixture="heldout",
            subsets=("super_glue/cb",),
            local=local,
            templates=SHARED / "templates/templates",
            target=tmp_path / "heldout",
            work=tmp_path / "work",
        )
    )
    assert (manifest.metrics["test"], manifest.metrics["train"]) == (56 * 15, 0)
    assert manifest.candidates == 56 * 15 * 3


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"mixture": "t0"}, ("mixture t0", "--templates", "cappy templates")),
        ({"mixture": "t0", "source": "x.jsonl"}, ("--mixture", "--source")),
        ({"subsets": ("a",)}, ("--subsets", "give --mixture")),
        ({"dataset": "a"}, ("--dataset", "give --templates FOLDER")),
        ({"template": ("a",)}, ("--template ", "give --templates FOLDER")),
        (
            {"mixture": "bigbench45", "subsets": ("tens",)},
            ("--subsets", "bigbench45", "'tens'", "ascii_word_recognition, "),
        ),
        (
            {"mixture": "heldout", "subsets": ("story_cloze/*",), "templates": Path("templates")},
            ("story_cloze/2016", "by hand", "Fill in the form", "--local FOLDER"),
        ),
        (
            {"source": "data.jsonl", "templates": Path("templates")},
            ("--templates needs --dataset",),
        ),
        (
            {"source": "data.jsonl", "templates": Path("templates"), "dataset": "quiz", "template": ("no",)},
            ("--template: quiz", "'ask, write a question'"),
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(
    settings: dict[str, Any],
    parts: tuple[str, ...],
    templates: Path,
    json_lines: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    json_lines(*quiz(2))
    (templates / "story_cloze/2016").mkdir(parents=True)
    (templates / "story_cloze/2016/templates.yaml").write_text(YAML)
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConfigError, ValueError)) as error:
        run(PreparationConfig(target=Path("target"), work=Path("work"), **settings))
    assert_names(str(error.value), *parts)
    assert not Path("target").exists()


def test_training_instances_that_stand_in_an_evaluation_set_are_refused_or_dropped(
    prepare: Prepare, json_lines: Any, tmp_path: Path
) -> None:
    held = json_lines(
        {"instruction": "Add 2 and 3.", "reference": "5"}, {"instruction": "q", "reference": "r"}, name="h"
    )
    prepare(held, test=0, validation=0, target=tmp_path / "heldout")
    rows = [{"instruction": f"Add {n} and 3.", "reference": str(n + 3), "id": str(n)} for n in range(10)]
    rows[2]["instruction"] = "ADD 2  and 3."
    path = json_lines(*rows)
    known = {"test": 0, "validation": 0, "against": (tmp_path / "heldout",)}
    with raises_naming(RecordError, "instance '2' of split train", str(tmp_path / "heldout"), "--leaked drop"):
        prepare(path, target=tmp_path / "never", **known)
    assert not (tmp_path / "never").exists()
    manifest, result = prepare(path, leaked="drop", **known)
    assert [instance.instance_id for instance in result] == [str(n) for n in range(10) if n != 2]
    assert (manifest.metrics["dropped_leaked"], manifest.metrics["train"]) == (1, 9)


def test_a_test_instance_may_stand_in_the_evaluation_set(prepare: Prepare, json_lines: Any, tmp_path: Path) -> None:
    path = json_lines({"instruction": "q", "reference": "r", "split": "test"})
    prepare(path, target=tmp_path / "heldout")
    assert len(prepare(path, against=(tmp_path / "heldout",))[1]) == 1


def test_shards_are_joined_whole_or_not_at_all(
    prepare: Prepare, json_lines: Any, templates: Path, tmp_path: Path
) -> None:
    path = json_lines(*quiz(9))
    known = {"templates": templates, "dataset": "quiz"}
    shards = tmp_path / "shards"
    for number in (0, 2):
        prepare(path, shard=f"{number}/3", target=shards / str(number), **known)
    with raises_naming(FolderError, f"{shards}: ", "1/3 is missing", "0/3, 2/3"):
        prepare(shards)
    prepare(path, seed=5, shard="1/3", target=shards / "1", **known)
    with raises_naming(FolderError, "shards/1: ", "not a shard", "shards/0"):
        prepare(shards)


def test_the_source_is_never_the_target(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    source, target = tmp_path / "a/../same", tmp_path / "same"
    write(target, [Instance(instance_id="1", instruction="i", references=("r",))])
    for step in (
        lambda: annotation(AnnotationConfig(source=source, target=target)),
        lambda: sampling(SamplingConfig(source=source, target=target)),
        lambda: run(PreparationConfig(source=str(source), target=target)),
    ):
        with raises_naming(ConfigError, str(target), "the source itself"):
            step()
    assert len(list(read(target))) == 1


@pytest.mark.parametrize(("text", "what"), [("a\0b", "NUL"), ("a\ud800b", "an unpaired surrogate")])
def test_texts_that_no_file_takes_are_failures_of_their_row(
    prepare: Prepare, json_lines: Any, templates: Path, text: str, what: str
) -> None:
    path = json_lines(*quiz(20), {"question": text, "topic": "t", "label": 1})
    known = {"templates": templates, "dataset": "quiz"}
    with pytest.raises(RecordError, match=rf"data\.jsonl:21: quiz: template 'ask': instruction .*{what}"):
        prepare(path, **known)
    manifest, result = prepare(path, max_failed=0.1, **known)
    assert manifest.metrics["failed"] == 2
    assert len(result) == 40


def test_templates_can_be_left_out_by_name(prepare: Prepare, json_lines: Any, templates: Path) -> None:
    path = json_lines(*quiz(5))
    _, result = prepare(path, templates=templates, dataset="quiz", template=("!write*",))
    assert {instance.template for instance in result} == {"ask"}


def test_nothing_left_to_train_on_is_refused(prepare: Prepare, json_lines: Any, templates: Path) -> None:
    # The wrong templates: no field is there, so every prompt is the same.
    path = json_lines(*[{"other": n, "label": 0} for n in range(50)])
    with raises_naming(RecordError, str(path), "no training instances", "--dataset", "--against"):
        prepare(path, templates=templates, dataset="quiz")


def test_a_folder_of_datasets_at_hand_must_be_there(templates: Path, tmp_path: Path) -> None:
    (templates / "imdb").mkdir()
    (templates / "imdb/templates.yaml").write_text(YAML)
    with raises_naming(ConfigError, str(tmp_path / "none"), "no such folder", "--local"):
        run(
            PreparationConfig(
                mixture="t0",
                subsets=("imdb",),
                templates=templates,
                local=tmp_path / "none",
                target=tmp_path / "t",
                work=tmp_path / "w",
            )
        )
