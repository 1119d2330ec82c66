"""Templates are read as plain values, and rendered as PromptSource and T0 render them: expected texts are by hand."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from wording import raises_naming

from cappy.errors import ConfigError, RecordError
from cappy.preparation.templates import RenderedRow, Template, find_fields, fixed_choices, load_templates, render

Make = Callable[..., Template]
Expected = tuple[str, str] | tuple[str, str, tuple[str, ...]] | None

ASK = "{{text}} ||| {{answer_choices[label]}}"
LIKED = "They didn't like it! ||| They loved it"
LIKED_CHOICES = ("They didn't like it!", "They loved it")

CASES: dict[str, tuple[str, str, Mapping[str, Any], Expected]] = {
    "apostrophes in values and choices": (
        'Is "{{text}}" good? ||| {{answer_choices[label]}}',
        LIKED,
        {"text": "it's 'fine'", "label": 0},
        ("Is \"it's 'fine'\" good?", "They didn't like it!", LIKED_CHOICES),
    ),
    "markup is not escaped": ("{{text}} ||| <b>", "", {"text": "a < b & \"c\" 'd'"}, ("a < b & \"c\" 'd'", "<b>")),
    "unicode": (
        "Übersetze: {{text}} ||| {{to}}",
        "",
        {"text": "naïve ☃ 猫", "to": "é"},
        ("Übersetze: naïve ☃ 猫", "é"),
    ),
    "the ends are stripped, the middle keeps its spaces": (
        "Say {{a}}!  Twice. ||| {{b}}\n",
        "",
        {"a": " hi  you ", "b": "\n yo \t"},
        ("Say  hi  you !  Twice.", "yo"),
    ),
    "pipes in a value": ("{{text}}|||{{other}}", "", {"text": "a ||| b", "other": "|||c"}, ("a ||| b", "|||c")),
    "pipes in an inner value split": ("{{texts[0]}} ||| y", "", {"texts": ["a ||| b"]}, None),
    "pipes in a choice come back": (
        "{{q}} ||| {{answer_choices[1]}}",
        "{{a}} ||| {{b}}",
        {"q": "Q", "a": "x ||| y", "b": "z"},
        ("Q", "z", ("x ||| y", "z")),
    ),
    "a chosen choice with pipes splits": (
        "{{q}} ||| {{answer_choices[0]}}",
        "{{a}} ||| {{b}}",
        {"q": "Q", "a": "x ||| y", "b": "z"},
        None,
    ),
    "pipes at the ends of a choice": (
        "{{q}} ||| {{answer_choices[1]}}",
        "{{a}} ||| {{b}}",
        {"q": "Q", "a": "||| x |||", "b": " z "},
        ("Q", "z", ("||| x |||", "z")),
    ),
    "choices of the row": (
        '{{q}} {{answer_choices | join(", ")}}? ||| {{answer_choices[label]}}',
        '{{choices.text | join("|||")}}',
        {"q": "Which,", "choices": {"label": ["A", "B"], "text": [" so ", "it's so"]}, "label": 1},
        ("Which, so, it's so?", "it's so", ("so", "it's so")),
    ),
    "the target need not be a choice": (
        "{{text}} ||| {{label}}",
        "Yes ||| No",
        {"text": "T", "label": "Maybe"},
        ("T", "Maybe", ("Yes", "No")),
    ),
    "a field that the row lacks is nothing": ("A{{gone}}B ||| y", "", {}, ("AB", "y")),
    "null is None": ("{{text}} ||| {{label}}", "", {"text": None, "label": 1.5}, ("None", "1.5")),
    "a blank value is a blank instruction": ("{{text}} ||| y", "", {"text": " \n"}, None),
    "a blank value is a blank target": ("x ||| {{text}}", "", {"text": ""}, None),
    "a condition without a target": (
        "Q ||| {% if label != -1 %}{{answer_choices[label]}}{% endif %}",
        "Yes ||| No",
        {"label": -1},
        None,
    ),
    "a condition around it all": ("{% if label == 1 %}Q ||| A{% endif %}", "", {"label": 0}, None),
    "two separators": ("a ||| b ||| c", "", {}, None),
    "no separator": ("a", "", {}, None),
    "hyphens in names": ("{{text}} ||| {{label_coarse}}", "", {"text": "T", "label-coarse": 2}, ("T", "2")),
    "of two names that become one the later counts": ("{{a_b}} ||| y", "", {"a-b": 1, "a_b": 2}, ("2", "y")),
    "inner fields, lists and slices": (
        "{{a.b[1:] | join('+')}} {{a['c'].d}} {{rows[0]['text']}} {{rows | length}} ||| {{(', ').join(a.b)}}",
        "",
        {"a": {"b": ["1", "2", "3"], "c": {"d": "D"}}, "rows": [{"text": "t"}]},
        ("2+3 D t 1", "1, 2, 3"),
    ),
    "a field called as a method is the method": (
        "{{a.keys() | list}} ||| y",
        "",
        {"a": {"keys": 1}},
        ("['keys']", "y"),
    ),
    "lists made and filled by the template": (
        "{% set up = [] %}{% for x in xs %}{{ up.append(x.upper()) or '' }}{% endfor %}{{ up | join('-') }} ||| y",
        "",
        {"xs": ["a", "b", "c"]},
        ("A-B-C", "y"),
    ),
    "a sum over a filtered loop": (
        "{% set s = namespace(n=0) %}{% for x in xs if x > 1 %}{% set s.n = s.n + x %}{% endfor %}{{s.n}} ||| y",
        "",
        {"xs": [1, 2, 3]},
        ("5", "y"),
    ),
    "zip and loop": (
        "{% for a, b in zip(xs, ys) %}{{loop.index}}/{{loop.length}}{{a}}{{b}};{% endfor %} ||| y",
        "",
        {"xs": "pq", "ys": ["r", "s", "t"]},
        ("1/2pr;2/2qs;", "y"),
    ),
    "most frequent": (
        "{{ xs | most_frequent | join(',') }} ||| y",
        "",
        {"xs": ["b", "a", "c", "a", "b"]},
        ("b,a", "y"),
    ),
    "up to 2,053 characters stay": ("{{text}} ||| y", "", {"text": "x" * 2053}, ("x" * 2053, "y")),
    "more are cut to 2,048": ("{{text}} ||| y", "", {"text": "x" * 2054}, ("x" * 2045 + "...", "y")),
    # 2,045 characters are 681 times "ab " and "ab"; the cut word goes, and the space before it.
    "the cut is between words": ("{{text}} ||| y", "", {"text": "ab " * 700}, ("ab " * 680 + "ab...", "y")),
    "of a sum the last operand alone is cut": (
        "{{ a + b }} ||| y",
        "",
        {"a": "x" * 3000, "b": "z" * 3000},
        ("x" * 3000 + "z" * 2045 + "...", "y"),
    ),
    "two closing braces inside count as an end": (
        '{{ {"a": {"b": 1}}["a"]["b"] + "x" }} ||| y',
        "",
        {},
        ("1x", "y"),
    ),
    "pipes count 32 characters when it is cut": (
        "{{text}} ||| y",
        "",
        {"text": "|||" + "x" * 2022},
        ("|||" + "x" * 2013 + "...", "y"),
    ),
    "choices are not cut": (
        "{{answer_choices[0]}} ||| {{answer_choices | length}}",
        "{{text}} ||| b",
        {"text": "x" * 2054},
        ("x" * 2045 + "...", "2", ("x" * 2054, "b")),
    ),
    "the mark that stands for pipes may be named": (
        '{% set docs = document.split("3ed2dface8203c4c9dfb1a5dc58e41e0||") %}{{docs | join("+")}} ||| y',
        "",
        {"document": "one|||||two|||||three"},
        ("one+two+three", "y"),
    ),
}


@pytest.mark.parametrize(("jinja", "choices", "row", "expected"), CASES.values(), ids=CASES)
def test_the_text_is_promptsources(
    template: Make, jinja: str, choices: str, row: Mapping[str, Any], expected: Expected
) -> None:
    rendered = render(template(jinja, choices), row)
    if expected is None:
        assert rendered is None
    else:
        instruction, target, *rest = expected
        assert rendered == RenderedRow(instruction=instruction, target=target, choices=rest[0] if rest else ())


@pytest.mark.parametrize(
    ("jinja", "row", "reason"),
    [
        ("{{gone.text}} ||| y", {"text": "t"}, "UndefinedError: .*'gone' is undefined.*fields of the row: 'text'"),
        ("{{text.gone()}} ||| y", {"text": "t"}, "UndefinedError: .*has no attribute 'gone'"),
        ("{{ (text[0] / text[1]) }} ||| y", {"text": [1, 0]}, "ZeroDivisionError"),
        ("{{text[5] + 1}} ||| y", {"text": [1]}, "UndefinedError: .*has no element 5"),
        ("{% for x in text %}{% endfor %} ||| y", {"text": 3}, "TypeError"),
        ("{{ xs | choice }} ||| y", {"xs": []}, "IndexError"),
        (ASK, {"text": "t", "answer-choices": []}, "field answer_choices"),
    ],
)
def test_a_row_that_fails_names_dataset_template_and_reason(
    template: Make, jinja: str, row: Mapping[str, Any], reason: str
) -> None:
    with pytest.raises(RecordError, match=f"^ours: template 'mine'.*{reason}") as caught:
        render(template(jinja), row)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "jinja",
    [
        "{% if text %}{{text}} ||| y",
        "{{ text | no_such_filter }} ||| y",
        "{{ text -}} ||| y",  # the filters come after the minus, in PromptSource too
    ],
)
def test_a_template_that_does_not_compile_says_so(template: Make, jinja: str) -> None:
    with pytest.raises(ConfigError, match=r"^ours: template 'mine' .*\(Template\w+Error: "):
        render(template(jinja), {"text": "t"})


def test_the_row_is_left_as_it_is(template: Make) -> None:
    row = {"xs": ["a"], "inner": {"ys": ["b"]}}
    jinja = "{% set _ = xs.append('z') %}{% set _ = inner.ys.append('z') %}{{xs}}{{inner}} ||| y"
    first, second = (render(template(jinja), row) for _ in range(2))
    assert first == second == RenderedRow(instruction="['a', 'z']{'ys': ['b', 'z']}", target="y")
    assert row == {"xs": ["a"], "inner": {"ys": ["b"]}}


def test_draws_are_the_rows_own_and_repeat(template: Make) -> None:
    drawing = template("{{text}} {{['a', 'b', 'c'] | choice}} {{range(9) | list | random}} ||| y")

    def drawn(seed: int) -> list[str]:
        rows = [{"text": str(number), "other": 1} for number in range(300)]
        return [rendered.instruction for row in rows if (rendered := render(drawing, row, seed=seed))]

    assert drawn(0) == drawn(0) != drawn(1)
    assert {text.split()[1] for text in drawn(0)} == {"a", "b", "c"}
    assert {text.split()[2] for text in drawn(0)} == set("012345678")


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ("", None),
        (LIKED, LIKED_CHOICES),
        ("no ||| {{ 'y' + 'es' }}", ("no", "yes")),
        ("{% set x = 'b' %}a|||{{ x }}", ("a", "b")),
        ("a ||| {{ text }}", None),
        ("{{ range(2) | join('|||') }}", ("0", "1")),
    ],
)
def test_choices_are_fixed_where_no_name_is_read(
    template: Make, choices: str, expected: tuple[str, ...] | None
) -> None:
    assert fixed_choices(template(ASK, choices)) == expected


def test_fields_are_the_names_that_a_row_must_have(template: Make) -> None:
    jinja = "{% set x = text %}{{x}} {% for i in range(n) %}{{loop.index}}{% endfor %} ||| {{answer_choices[label]}}"
    assert find_fields(template(jinja, "{{options.text}} ||| b")) == {"text", "n", "label", "options"}


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
        ("super_glu/rte", "super_glue/rte"),
        ("super_glue", "super_glue/rte"),
        ("rte", "super_glue/rte"),
        ("weather", "1 folders"),
    ],
)
def test_a_dataset_without_templates_is_answered_with_near_names(folder: Path, asked: str, remedy: str) -> None:
    with raises_naming(ConfigError, str(folder), f"'{asked}'", remedy):
        load_templates(folder, asked)


@pytest.mark.parametrize("asked", ["../super_glue/rte", "/super_glue/rte", "", "super_glue/../super_glue/rte"])
def test_a_dataset_cannot_point_out_of_the_folder(folder: Path, asked: str) -> None:
    with raises_naming(ConfigError, f"'{asked}'", "name of a dataset"):
        load_templates(folder, asked)


def test_an_empty_folder_is_reported_from_an_unknown_dataset(tmp_path: Path) -> None:
    with raises_naming(ConfigError, str(tmp_path), "no templates.yaml"):
        load_templates(tmp_path, "imdb")


@pytest.mark.parametrize(
    ("was", "becomes", "reason"),
    [
        ("subset: rte", "subset: [", r"templates.yaml:\d+: "),
        ("id: first", "id: !!python/object/apply:os.getcwd []", r"templates.yaml:\d+: .*python/object/apply:os.getcwd"),
        ("id: first", "id: !!python/name:os.system ''", r"templates.yaml:\d+: .*python/name:os.system"),
        ("reference: ''", "reference: !Other {}", r"templates.yaml:\d+: .*!Other"),
        ("templates:", "prompts:", "no mapping 'templates'"),
        ("name: ant", "name: 3", "template 'first': name .*3"),
        ("name: ant", "name: zebra", "two templates .*'zebra'"),
        ("answer_choices: null", "answer_choices: ['Yes', 'No']", "answer_choices .*\\['Yes', 'No'"),
        ("metrics: []", "metrics: BLEU", "metrics .*list.*'BLEU'"),
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
