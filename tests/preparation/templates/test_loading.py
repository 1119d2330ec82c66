"""Template files are read as plain values; what is wrong with one is said in one line."""

from pathlib import Path

import pytest

from cappy.errors import ConfigError
from cappy.preparation.templates import Template, load_templates

FILE = """\
dataset: super_glue
subset: rte
templates:
  second: !Template
    answer_choices: They didn't ||| They did
    id: second
    jinja: '{{text}} |||

      {{answer_choices[label]}}'
    metadata: !TemplateMetadata
      choices_in_prompt: true
      languages:
      - en
      metrics:
      - Accuracy
      original_task: true
    name: zebra
    reference: ''
  first: !Template
    answer_choices: null
    id: first
    jinja: "{{text}} |||\\t{{label}}"
    metadata: !TemplateMetadata
      choices_in_prompt: null
      metrics: []
      original_task: null
    name: ant
    reference: ''
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, FILE)
    return tmp_path


def write(folder: Path, content: str, dataset: str = "super_glue/rte") -> Path:
    path = folder / dataset / "templates.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def test_templates_come_sorted_by_name_with_the_facts_of_their_file(folder: Path) -> None:
    assert load_templates(folder, "super_glue/rte") == (
        Template(name="ant", id="first", dataset="super_glue/rte", jinja="{{text}} |||\t{{label}}"),
        Template(
            name="zebra",
            id="second",
            dataset="super_glue/rte",
            jinja="{{text}} |||\n{{answer_choices[label]}}",
            answer_choices="They didn't ||| They did",
            original_task=True,
            choices_in_prompt=True,
            metrics=("Accuracy",),
        ),
    )


@pytest.mark.parametrize(
    ("asked", "remedy"),
    [
        ("super_glu/rte", "choose of super_glue/rte"),
        ("super_glue", "choose of super_glue/rte"),
        ("rte", "choose of super_glue/rte"),
        ("weather", "choose one of the 1 folders there"),
    ],
)
def test_a_dataset_without_templates_is_answered_with_near_names(folder: Path, asked: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=f"has no templates for '{asked}'; {remedy}"):
        load_templates(folder, asked)


@pytest.mark.parametrize("asked", ["../super_glue/rte", "/super_glue/rte", "", "super_glue/../super_glue/rte"])
def test_a_dataset_cannot_point_out_of_the_folder(folder: Path, asked: str) -> None:
    with pytest.raises(ConfigError, match="is not the name of a dataset"):
        load_templates(folder, asked)


def test_an_empty_folder_is_told_from_an_unknown_dataset(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no templates.yaml"):
        load_templates(tmp_path, "imdb")


@pytest.mark.parametrize(
    ("was", "becomes", "reason"),
    [
        ("subset: rte", "subset: [", r"templates.yaml:\d+: is no file of templates"),
        ("id: first", "id: !!python/object/apply:os.getcwd []", r"templates.yaml:\d+: .*python/object/apply:os.getcwd"),
        ("id: first", "id: !!python/name:os.system ''", r"templates.yaml:\d+: .*python/name:os.system"),
        ("reference: ''", "reference: !Other {}", r"templates.yaml:\d+: .*!Other"),
        ("templates:", "prompts:", "no mapping 'templates'"),
        ("name: ant", "name: 3", "template 'first': name must be a text, got 3"),
        ("name: ant", "name: zebra", "two templates are called 'zebra'"),
        ("answer_choices: null", "answer_choices: ['Yes', 'No']", "answer_choices must be a text, got \\['Yes', 'No'"),
        ("metrics: []", "metrics: BLEU", "metrics must be a list, got 'BLEU'"),
    ],
)
def test_a_malformed_file_is_named_with_the_place_and_the_reason(
    tmp_path: Path, was: str, becomes: str, reason: str
) -> None:
    path = write(tmp_path, FILE.replace(was, becomes, 1))
    with pytest.raises(ConfigError, match=reason) as caught:
        load_templates(tmp_path, "super_glue/rte")
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_python_tag_runs_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    write(tmp_path, FILE.replace("id: first", f"id: !!python/object/apply:pathlib.Path.touch ['{trace}']"))
    with pytest.raises(ConfigError):
        load_templates(tmp_path, "super_glue/rte")
    assert not trace.exists()
