"""What a template may take: it ends within seconds, in one line, and the process that asked for it grows by little.

Each of these ran for minutes, or took gigabytes, where templates were rendered in the process itself.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from wording import assert_names, raises_naming

from cappy.errors import CappyError, ConfigError
from cappy.preparation.templates import (
    LimitError,
    RenderedRow,
    Template,
    find_fields,
    fixed_choices,
    render,
    render_rows,
)

Make = Callable[..., Template]

PRIME = 2**61 - 1
"""Whole numbers that this divides have the same hash."""
EACH = "{% for i in range(99999) %}BODY{% endfor %}"
OFTEN = "{% for i in range(99999) %}" * 3 + "BODY" + "{% endfor %}" * 3
DOUBLE = "{% set ns = namespace(x=['ab'], y=['ab']) %}" + "{% for i in range(99) %}BODY{% endfor %}"
COLLIDING = [PRIME * number for number in range(1, 20_000)]

HOSTILE: dict[str, str] = {
    "a list of 33 million characters": "{% set x = ('猫' * 33000000) | list %}{{ x | length }}",
    "lists of characters": "{% set x = [] %}" + EACH.replace("BODY", "{{ x.append(('a' * 999999) | list) }}"),
    "wide formats": "{% set x = ('%()999d😀' * 900000) % {'': 1} %}",
    "wide formats as filter": "{% set x = ('%(a)999d😀' * 900000) | format(a=1) %}",
    "lists in lists": DOUBLE.replace("BODY", "{% set ns.x = [ns.x, ns.x] %}") + "{{ ns.x | string | length }}",
    "lists in lists compared": (
        DOUBLE.replace("BODY", "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}") + "{{ ns.x == ns.y }}"
    ),
    "quadratic select": "{% set x = range(99999) | list %}{{ x | select('in', x) | list | length }}",
    "quadratic reject": (
        "{% set x = ('ab ' * 99999).split() %}{{ range(99999) | map('string') | reject('in', x) | list | length }}"
    ),
    "digits of whole numbers": OFTEN.replace("BODY", "{% set x = ('9' * 4300) | int %}"),
    "a whole number of many digits": "{% set x = ('f' * 99999999) | int(base=16) %}{{ (x * x * x * x) % 7 }}",
    "powers of powers": "{{ text | length ** 99 ** 99 ** 9 }}{{ 9 ** 99 ** 99 }}",
    "hash collisions": (
        "{% set d = {} %}" + EACH.replace("BODY", f"{{% set _ = d.update({{i * {PRIME}: 1, -i * {PRIME}: 1}}) %}}")
    ),
    "hash collisions of the row": "{% for i in range(99) %}{{ xs | unique | list | length }}{% endfor %}",
    "hash collisions counted": "{% for i in range(99) %}{{ xs | most_frequent | length }}{% endfor %}",
    "many namespaces": ("{% set x = [] %}" + OFTEN.replace("BODY", "{% set _ = x.append(namespace(a=i)) %}")),
    "many macros": (
        "{% set x = [] %}" + OFTEN.replace("BODY", "{% macro m() %}{{ i }}{% endmacro %}{% set _ = x.append(m) %}")
    ),
    "a macro that calls itself": "{% macro m(x) %}{{ m([x, x]) ~ m([x]) }}{% endmacro %}{{ m(1) }}",
    "a loop that calls itself": "{% for i in [xs] recursive %}{{ loop([i, i]) }}{% endfor %}",
    "a sort": "{% set x = ('b' * 9999 ~ ' ') * 2000 %}" + EACH.replace("BODY", "{{ x.split() | sort | length }}"),
    "a long replace": "{% set a = 'ab' * 9999999 %}" + EACH.replace("BODY", "{% set x = a.replace('ab', 'cde') %}"),
    "a slow strip": "{{ ('a' * 9999999).strip('b' * 9999999 ~ 'a') }}",
    "a large text": OFTEN.replace("BODY", "a" * 99),
}

UNCOMPILED: dict[str, str] = {
    "a constant power": "{{ 10 ** 10 ** 8 }}",
    "a constant text": "{{ ('a' * 10 ** 9) ~ 'b' }}",
    "a constant shifted": "{{ 7 | round(-100000000) }}",
    "constants in constants": "{{ (('a' * 99999) | list * 99999) | length }}",
    "brackets": "{{" + "(" * 99999 + "1" + ")" * 99999 + "}}",
    "a chain": "{{ 1" + " + 1" * 99999 + " }}",
    "blocks": "{% if a %}" * 9999 + "{% endif %}" * 9999,
    "many words": "{{ a }}" * 300_000,
    "operators": "{{ " + "not " * 99999 + "a }}",
}


@pytest.mark.usefixtures("within")
@pytest.mark.parametrize("jinja", HOSTILE.values(), ids=HOSTILE)
def test_a_template_that_takes_too_much_is_stopped_and_the_asker_grows_by_little(template: Make, jinja: str) -> None:
    with pytest.raises(CappyError, match=r"^ours: template 'mine' ") as caught:
        render(template(f"x ||| y{jinja}"), {"text": "t", "xs": COLLIDING}, seconds=0.5)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("within")
@pytest.mark.parametrize("jinja", UNCOMPILED.values(), ids=UNCOMPILED)
def test_a_template_that_takes_too_much_when_it_is_compiled_is_stopped_too(template: Make, jinja: str) -> None:
    for act in (find_fields, fixed_choices, lambda template: render(template, {}, seconds=0.5)):
        with contextlib.suppress(CappyError):  # some of them do compile, in time
            act(template(f"x ||| y{jinja}", answer_choices=jinja))


def test_a_constant_that_takes_too_long_does_not_compile(template: Make) -> None:
    with raises_naming(ConfigError, "template 'mine'", "2 seconds"):
        find_fields(template("x ||| {{ 7 | round(-1000000000) }}"))


def test_a_text_that_grows_on_the_way_back_is_refused(template: Make) -> None:
    with raises_naming(LimitError, "template 'mine'", "8 MiB"):
        render(template("x ||| " + "{% for i in range(9999) %}" + "é" * 999 + "{% endfor %}"), {})


@pytest.mark.usefixtures("within")
def test_other_rows_and_templates_are_rendered_beside_one_that_ends_the_child(template: Make) -> None:
    bombs = {
        "memory": "{% set x = ('a' * bomb * 999999999) | list %}",
        "time": "{% set x = ('a' * bomb * 9999999).strip('b' * 9999999 ~ 'a') %}",
        "size": "{% for i in range(bomb * 9999) %}" + "é" * 999 + "{% endfor %}",
    }
    plain = template("{{text}} ||| y")
    templates = [plain, *(template(f"{{{{text}}}} ||| y{jinja}") for jinja in bombs.values()), plain]
    rows: list[dict[str, Any]] = [{"text": str(number), "bomb": int(number in (3, 40))} for number in range(80)]
    results = list(render_rows([(row, templates) for row in rows], seconds=0.5))
    for row, result in zip(rows, results, strict=True):
        whole = RenderedRow(instruction=row["text"], target="y")
        expected = [LimitError] * 3 if row["bomb"] else [RenderedRow] * 3
        assert [type(one) for one in result] == [RenderedRow, *expected, RenderedRow]
        assert result[0] == result[-1] == whole
    for error, limit in zip(results[40][1:4], ("512 MiB", "0.5 seconds", "8 MiB"), strict=True):
        assert_names(str(error), limit)


def test_rows_before_an_unreadable_one_are_rendered(template: Make) -> None:
    def rows() -> Iterator[tuple[dict[str, Any], list[Template]]]:
        yield {"text": "a"}, [template("{{text}} ||| y")]
        raise OSError("unreadable")

    results = render_rows(rows())
    assert next(results) == [RenderedRow(instruction="a", target="y")]
    with pytest.raises(OSError, match="unreadable"):
        next(results)


def test_a_row_that_is_nested_too_deep_is_an_error_of_its_own(template: Make) -> None:
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    with raises_naming(CappyError, "ours: template 'mine'", "nested too deep"):
        render(template("{{text}} ||| y"), {"text": "t", "deep": deep})


def test_a_row_of_many_and_of_large_values_is_rendered(template: Make) -> None:
    row = {"text": "t", **{f"field{number}": "é" * 99 for number in range(9999)}, "large": "x" * 9_999_999}
    assert json.dumps(row)
    assert render(template("{{text}} ||| {{large}}"), row) == RenderedRow(instruction="t", target="x" * 2045 + "...")
