"""PromptSource's own templates, on real rows, beside what T0's pipeline made of them."""

import gzip
import json
import lzma
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from cappy.errors import CappyError
from cappy.preparation.templates import RenderedRow, Template, find_fields, fixed_choices, load_templates, render

SAMPLE = 50

HELD_OUT = {
    "super_glue/rte": ("super_glue_rte.validation", 10, 10),
    "super_glue/cb": ("super_glue_cb.validation", 15, 15),
    "super_glue/wsc.fixed": ("super_glue_wsc.fixed.validation", 10, 10),
    "super_glue/wic": ("super_glue_wic.validation_500of638", 10, 10),
    "anli": ("anli_r1.test", 15, 15),
    "story_cloze/2016": ("story_cloze_2016.validation", 6, 6),
    "winogrande/winogrande_xl": ("winogrande_xl.validation", 6, 6),
    "hellaswag": ("hellaswag.validation", 8, 7),
}
"""Dataset: its file, its templates with choices, and how many of them render every row."""

READ_BACK = {
    "ag_news": ("classify", 1200),
    "amazon_polarity": ("Is_this_review", 1600),
    "cnn_dailymail/3.0.0": ("news_summary", 1600),
    "cosmos_qa": ("context_description_question_answer_id", 2400),
    "gigaword": ("TLDR", 1600),
    "glue/mrpc": ("paraphrase", 1084),
    "glue/qqp": ("answer", 1000),
    "imdb": ("Movie Expressed Sentiment", 2000),
    "paws/labeled_final": ("Concatenation", 2091),
    "rotten_tomatoes": ("Movie Expressed Sentiment", 1800),
    "wiki_qa": ("Decide_good_answer", 848),
    "xsum": ("DOC_boils_down_to_simple_idea_that", 1800),
    "yelp_review_full": ("based_on_that", 1200),
}
"""Dataset: the template that its rows are read back from, and how many prompts of its others are compared."""

Prompts = dict[str, dict[str, list[dict[str, Any]]]]


def rows_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def every_template(folder: Path) -> Iterator[Template]:
    for file in sorted(folder.rglob("templates.yaml")):
        yield from load_templates(folder, file.parent.relative_to(folder).as_posix())


def task_name(template: Template) -> str:
    """The name of T0's task, dots in it as the file of T0's prompts has them."""
    return re.sub(r"\W+", "_", f"{template.dataset}_{template.name}")


@pytest.fixture(scope="module")
def t0(shared: Path) -> Prompts:
    """What T0's pipeline made of the first 200 rows: dataset, task, prompts in order."""
    prompts: Prompts = defaultdict(lambda: defaultdict(list))
    with lzma.open(shared / "t0/t0_train_50k.jsonl.xz", "rt") as file:
        for line in file:
            prompt = json.loads(line)
            prompts[prompt["dataset"]][prompt["template"]].append(prompt)
    return prompts


def test_every_real_template_loads_and_compiles(real_templates: Path) -> None:
    templates = list(every_template(real_templates))
    assert len(templates) == 2085
    failures = [failure for template in templates if (failure := failure_of(template))]
    assert not [failure for failure in failures if "does not compile" in failure or "SecurityError" in failure]


def failure_of(template: Template) -> str:
    """How the template fails on a row of no fields, which none of the real ones needs to survive."""
    try:
        find_fields(template)
        fixed_choices(template)
        render(template, {})
    except CappyError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("dataset", "facts"), HELD_OUT.items(), ids=HELD_OUT)
def test_rank_classification_templates_render_the_held_out_tasks(
    shared: Path, real_templates: Path, dataset: str, facts: tuple[str, int, int]
) -> None:
    name, num_ranked, num_rendered = facts
    rows = rows_of(shared / f"heldout_tasks/{name}.jsonl.gz")[:SAMPLE]
    ranked = [template for template in load_templates(real_templates, dataset) if template.answer_choices]
    failing = [template.name for template in ranked if not all(rendered(template, row) for row in rows)]
    assert len(ranked) == num_ranked
    assert len(ranked) - len(failing) == num_rendered
    assert failing == (["complete_first_then"] if dataset == "hellaswag" else [])


def rendered(template: Template, row: Mapping[str, Any]) -> RenderedRow | None:
    try:
        return render(template, row)
    except CappyError:
        return None


@pytest.mark.parametrize(
    ("dataset", "name", "file", "expected"),
    [
        (
            "super_glue/rte",
            "GPT-3 style",
            "super_glue_rte.validation",
            RenderedRow(
                instruction="Dana Reeve, the widow of the actor Christopher Reeve, has died of lung cancer at age 44, "
                "according to the Christopher Reeve Foundation.\nQuestion: Christopher Reeve had an accident. "
                "True or False?",
                target="False",
                choices=("True", "False"),
            ),
        ),
        (
            "super_glue/cb",
            "GPT-3 style",
            "super_glue_cb.validation",
            RenderedRow(
                instruction="Valence the void-brain, Valence the virtuous valet. Why couldn't the figger choose his "
                "own portion of titanic anatomy to shaft? Did he think he was helping?\nQuestion: Valence was helping "
                "True, False, or Neither?",
                target="False",
                choices=("True", "False", "Neither"),
            ),
        ),
        (
            "winogrande/winogrande_xl",
            "Replace",
            "winogrande_xl.validation",
            RenderedRow(
                instruction="Sarah was a much better surgeon than Maria so _ always got the easier cases.\nReplace the "
                "_ in the above sentence with the correct option: \n- Sarah\n- Maria",
                target="Maria",
                choices=("Sarah", "Maria"),
            ),
        ),
        (
            "story_cloze/2016",
            "Answer Given options",
            "story_cloze_2016.validation",
            RenderedRow(
                instruction="Rick grew up in a troubled household. He never found good support in family, and turned "
                "to gangs. It wasn't long before Rick got shot in a robbery. The incident caused him to turn a new "
                "leaf. What is a possible continuation for the story given the following options ? - He is happy now.\n"
                "- He joined a gang.",
                target="He is happy now.",
                choices=("He is happy now.", "He joined a gang."),
            ),
        ),
        (
            "hellaswag",
            "Open-ended completion",
            "hellaswag.validation",
            RenderedRow(
                instruction="Complete the sentence: A man is sitting on a roof. he",
                target="starts pulling up roofing on a roof.",
                choices=(
                    "is using wrap to wrap a pair of skis.",
                    "is ripping level tiles off.",
                    "is holding a rubik's cube.",
                    "starts pulling up roofing on a roof.",
                ),
            ),
        ),
    ],
)
def test_the_first_row_reads_as_worked_out_by_hand(
    shared: Path, real_templates: Path, dataset: str, name: str, file: str, expected: RenderedRow
) -> None:
    (template,) = (template for template in load_templates(real_templates, dataset) if template.name == name)
    assert render(template, rows_of(shared / f"heldout_tasks/{file}.jsonl.gz")[0]) == expected


@pytest.mark.parametrize(("dataset", "facts"), READ_BACK.items(), ids=READ_BACK)
def test_prompts_are_t0s_own_with_the_rows_that_t0_dropped(
    t0: Prompts, real_templates: Path, dataset: str, facts: tuple[str, int]
) -> None:
    """Rows are read back from one template's prompts; all prompts of the others must come of them, in order."""
    name, num_compared = facts
    templates = {template.name: template for template in load_templates(real_templates, dataset)}
    source = templates.pop(name)
    rows = [read_back(source, prompt) for prompt in t0[dataset][task_name(source)]]
    compared = 0
    for template in templates.values():
        theirs = t0[dataset].get(task_name(template), [])
        ours = [mine for row in rows if (mine := render(template, row))] if theirs else []
        assert [as_t0(mine, like) for mine, like in zip(ours, theirs, strict=True)] == [as_read(one) for one in theirs]
        compared += len(theirs)
    assert compared == num_compared


def test_prompts_of_the_rows_themselves_are_t0s_own(shared: Path, t0: Prompts, real_templates: Path) -> None:
    reviews = {
        row["input"]: {"text": row["input"], "label": row["options"].index(row["output"])}
        for row in rows_of(shared / "classification/rotten_tomatoes.train8529.jsonl.gz")
    }
    templates = load_templates(real_templates, "rotten_tomatoes")
    (source,) = (template for template in templates if template.name == "Movie Expressed Sentiment")
    texts = [read_back(source, prompt)["text"] for prompt in t0["rotten_tomatoes"][task_name(source)]]
    for template in templates:
        theirs = t0["rotten_tomatoes"][task_name(template)]
        ours = [render(template, reviews[text]) for text in texts]
        assert [as_t0(mine, like) for mine, like in zip(ours, theirs, strict=True)] == [as_read(one) for one in theirs]


def read_back(template: Template, prompt: Mapping[str, Any]) -> dict[str, Any]:
    """The row that a template of plain fields made this prompt of."""
    row: dict[str, Any] = {}
    texts = (prompt["instruction"], prompt["response"])
    for part, text in zip(template.jinja.split("|||"), texts, strict=True):
        pieces = re.split(r"{{\s*(.*?)\s*}}", part.strip())
        pattern = "".join(
            f"(?P<{re.sub(r'answer_choices ?.label.', 'label', piece)}>.*)" if index % 2 else re.escape(piece)
            for index, piece in enumerate(pieces)
        )
        match = re.fullmatch(pattern, text, re.DOTALL)
        assert match, f"{text!r} is not a prompt of {template.name}"
        row |= match.groupdict()
    choices: Sequence[str] = fixed_choices(template) or ()
    return row | ({"label": choices.index(row["label"])} if choices else {})


def as_t0(mine: RenderedRow | None, like: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Instruction, response and choices; without these where the file of T0's prompts has none."""
    if mine is None:
        return None
    return (mine.instruction, mine.target, list(mine.choices) if "answer_choices" in like else None)


def as_read(prompt: Mapping[str, Any]) -> tuple[Any, ...]:
    return prompt["instruction"], prompt["response"], prompt.get("answer_choices")
