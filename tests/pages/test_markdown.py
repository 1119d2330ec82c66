"""Names in Markdown show themselves, whatever renders it, and are no element, link, picture or block."""

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import markdown as python_markdown
import pytest
from markdown_it import MarkdownIt

from cappy.evaluation import Report, evaluate
from cappy.evaluation.findings import Probe
from cappy.pages import escape_code, escape_text, table
from cappy.records import Candidate, Instance, Manifest
from cappy.registry.card import model_card

HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "</td></table><iframe src=http://evil.example>",
    "[click](javascript:alert(1))",
    "![](http://evil.example/pixel.png)",
    "[ref]: javascript:alert(1)",
    "![][pixel]\n\n[pixel]: http://evil.example/pixel.png",
    "<javascript:alert(1)>",
    "<http://evil.example>",
    "http://evil.example/a_b",
    "www.evil.example",
    "someone@evil.example",
    "mailto:someone@evil.example",
    "@everyone",
    "`code` ``two`` ```three",
    "```\nfenced\n```",
    "a | b | c",
    "a\\| b",
    "ends with a backslash\\",
    "one\n\n# heading\n\n- list\n\n> quote\n\n---\n\nheading\n===",
    "# heading",
    "- list",
    "+ list",
    "1. list",
    "2) list",
    "> quote",
    "***",
    "    indented",
    "**bold** __bold__ *it* _it_ ~~gone~~",
    "&lt;b&gt; &#60;script&#62; &amp;amp;",
    "{: onclick=alert(1) }",
    "{ onmouseover=alert(1) .cls }",
    "<!-- hidden",
    "<![CDATA[ x ]]>",
    "<?php x ?>",
    "*[HTML]: title",
    "[^1]: note",
    "term\n:   definition",
    "$x$ $$y$$",
    "line\u2028separator\x00\x1b[31mred",
    "evil\u202egnp.exe",
)
PLAIN = {"h1", "h2", "p", "ul", "li", "strong", "table", "thead", "tbody", "tr", "th", "td"}
"""What a report of harmless names has."""


class Page(HTMLParser):
    """Elements, attributes and text of what a renderer made."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: set[tuple[str, str | None]] = set()
        self.shown = ""
        self.other: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.update(attrs)

    def handle_data(self, data: str) -> None:
        self.shown += data

    def handle_comment(self, data: str) -> None:
        self.other.append(data)

    def handle_decl(self, decl: str) -> None:
        self.other.append(decl)

    def unknown_decl(self, data: str) -> None:
        self.other.append(data)

    def handle_pi(self, data: str) -> None:
        self.other.append(data)


def common_mark(source: str) -> str:
    """CommonMark with GitHub's tables, HTML let through."""
    html: str = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(source)
    return html


def python(source: str) -> str:
    """Python-Markdown with all of its extensions that make elements, and GitHub's links to addresses and people."""
    extensions = ["extra", "sane_lists", "toc", "admonition", "pymdownx.magiclink", "pymdownx.tilde", "pymdownx.caret"]
    mentions = {
        "pymdownx.magiclink": {"social_url_shorthand": True, "user": "u", "repo": "r", "repo_url_shorthand": True}
    }
    return python_markdown.markdown(source, extensions=extensions, extension_configs=mentions)


RENDERERS: Mapping[str, Callable[[str], str]] = {"CommonMark": common_mark, "Python-Markdown": python}
renderers = pytest.mark.parametrize("render", RENDERERS.values(), ids=RENDERERS)


def seen(value: str) -> str:
    """What a reader of the name is to see: one line, what hides or turns letters replaced."""
    line = "".join(" " if one.isspace() else one if one.isprintable() else "\ufffd" for one in value)
    return " ".join(line.split())


def words(page: Page) -> str:
    return " ".join(page.shown.replace("\u2060", "").split())


@renderers
@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_a_name_shows_itself_and_nothing_else(render: Callable[[str], str], name: str) -> None:
    shown = escape_text(name)
    parts = (f"# {shown}", f"- {shown}", shown, table([("task", "n"), (name, "1")]), f"**{shown}**")
    page = Page(render("\n\n".join(parts) + "\n"))
    assert set(page.tags) <= PLAIN
    assert (page.tags.count("table"), page.tags.count("tr"), page.tags.count("td")) == (1, 2, 2)
    assert (page.tags.count("h1"), page.tags.count("ul"), page.tags.count("li"), page.tags.count("p")) == (1, 1, 1, 2)
    assert {key for key, _ in page.attributes} <= {"style", "id"}
    assert page.other == []
    assert words(page).count(seen(name)) == 5


@renderers
def test_no_text_of_odd_characters_becomes_an_element(render: Callable[[str], str]) -> None:
    draw = random.Random(0)
    words = ("://", "http://e.x", "www.e.x", "javascript:", "a@b.c", "<b", "</", "&#60;", "&lt;", "](", "``")
    pieces = [*"<>[]()!`*_~|\\&;:#@.\"'{}=+-0 \n\ta", *words]
    for _ in range(1000):
        name = "x" + "".join(draw.choices(pieces, k=draw.randint(1, 14)))
        page = Page(render(f"- {escape_text(name)}\n\n{table([('task',), (name,)])}\n"))
        assert set(page.tags) <= PLAIN, name
        assert page.other == [], name


def test_ordinary_names_stay_readable_in_the_source() -> None:
    assert escape_text("The scorer is better than MBR: 42.1 against 40.0, +2.1 (95% interval 1.0 to 3.2).") == (
        "The scorer is better than MBR: 42.1 against 40.0, +2.1 (95% interval 1.0 to 3.2)."
    )
    for name in ("glue/mrpc", "50.0", "+2.1", "-3", "0.5*", "a: b", "models:/cappy"):
        assert escape_text(name).replace("\\*", "*") == name
    assert escape_code("models:/cappy@champion") == "models:/cappy@champion"


def report_of(name: str, make_instance: Callable[..., Instance], score: Any) -> Report:
    """A report in which everything that data or settings name has this name."""

    def renamed(instance: Instance) -> Instance:
        candidates = tuple(replace(one, generator=name, decoding=name) for one in instance.candidates)
        return replace(
            instance, task=name, template=name, instruction=f"{name} {instance.instance_id}", candidates=candidates
        )

    instances = [renamed(make_instance(index)) for index in range(20)]
    held = [renamed(make_instance(index, split="validation")) for index in range(100, 120)]
    report = evaluate([*instances, *held], score=score)
    probe = Probe(name=name, value=0.5, meaning=name)
    return replace(report, metric=name, split=name, probes=(probe,), versions={"challenger": name})


@pytest.fixture
def make_instance() -> Callable[..., Instance]:
    def make(index: int, *, split: str = "test") -> Instance:
        draw = random.Random(index)
        candidates = tuple(
            Candidate(response=f"{index} {position}", labels={"rougeL": draw.random()}) for position in range(4)
        )
        values: dict[str, Any] = {"split": split, "references": ("yes",), "candidates": candidates}
        return Instance(instance_id=f"{split}-{index}", instruction="say", **values)

    return make


def by_length(pairs: Any) -> list[float]:
    return [len(response) / 10 for _, response in pairs]


@renderers
@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_no_name_in_a_whole_report_becomes_an_element(
    render: Callable[[str], str], name: str, make_instance: Callable[..., Instance]
) -> None:
    page = Page(render(report_of(name, make_instance, by_length).markdown()))
    assert set(page.tags) <= PLAIN
    assert {key for key, _ in page.attributes} <= {"style", "id"}
    assert page.other == []
    assert seen(name) in words(page)


def card_of(name: str, report: Report) -> str:
    values: Any = report.to_dict()
    values["verdict"] = [name, f"The scorer is better than {name}."]
    values["next"] = name
    values["facts"]["instances"] = name
    values["selectors"][name] = values["selectors"]["scorer"]
    scorer = Manifest(
        step=name,
        files=(),
        code=name,
        config={name: name},
        generators={name: name},
        parents=(name,),
    )
    return model_card(name, scorer, values, licence=name)


@renderers
@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_no_name_in_a_whole_model_card_becomes_an_element(
    render: Callable[[str], str], name: str, make_instance: Callable[..., Instance]
) -> None:
    card = card_of(name, report_of(name, make_instance, by_length))
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    lines = [line.partition(":")[0] for line in front.splitlines()]
    assert lines == ["library_name", "pipeline_tag", "license", "tags"]
    assert re.search(r"^license: [\w.+-]+$", front, re.MULTILINE)
    harmless = Page(render(card_of("name", report_of("name", make_instance, by_length)).partition("\n---\n")[2]))
    page = Page(render(body))
    assert set(page.tags) <= set(harmless.tags) == PLAIN - {"strong"} | {"code", "pre"}
    for tag in ("h1", "h2", "pre", "table", "ul", "li", "tr", "td", "p", "code"):
        assert page.tags.count(tag) == harmless.tags.count(tag), tag
    assert {key for key, _ in page.attributes} <= {"style", "id", "class"}
    assert page.other == []
    assert seen(name) in words(page)


def test_the_card_of_an_ordinary_name_reads_as_it_did() -> None:
    card = model_card("cappy", Manifest(step="finetuning", files=(), config={"a_b": 1}), {}, licence="mit")
    for line in (
        "license: mit",
        "# cappy",
        'scorer = Scorer.load("models:/cappy@champion")',
        "`cappy serve --scorer models:/cappy@champion` serves it over HTTP.",
        '- recipe: `{"a_b": 1}`',
        "- licence of the base encoder: mit",
    ):
        assert line in card
