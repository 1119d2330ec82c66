"""Chat templates: the prompt is transformers' own, and a hostile one ends in one line that names the folder."""

import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from cappy.errors import FolderError
from cappy.model_folder import open_model_folder
from cappy.rendering.jobs import RenderJob
from cappy.sampling.architectures import Causal
from cappy.sampling.drawing import chat_prompt
from cappy.sampling.strategies import GREEDY

CHATML = """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3 = """\
{{- bos_token }}
{%- if strftime_now is defined %}
    {%- set date_string = strftime_now("%d %b %Y – %j") %}
{%- else %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """\
{%- set loop_messages = messages %}
{%- set ns = namespace(index=0) %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("roles must alternate") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
    {%- if message.role == "user" %}{{- "[INST] " + message.content + "[/INST]" }}{%- endif %}
{%- endfor %}
{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}{% if m.role == 'system' %}{% continue %}{% endif %}
{{ loop.index0 }}{% endfor %}
"""
TEMPLATES: dict[str, Any] = {
    "ChatML": CHATML,
    "Llama 3": LLAMA3,
    "Mistral": MISTRAL,
    "a generation block": (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}{{ eos_token }}"
    ),
    "JSON": (
        "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ {'b': 1, 'a': '<é>'} | tojson(sort_keys=true) }}"
    ),
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ sep_token }}{{ gone }}",
    "what is not given": "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ chat_template }}",
    "a mapping of its own": "{{ dict(a=1) }}{% set ns = namespace(a=1) %}{{ ns.a }}",
    "a macro": "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(2) }}",
    "templates by name": {"default": CHATML, "tool_use": MISTRAL},
    "several in a list": [{"name": "default", "template": MISTRAL}, {"name": "rag", "template": "x"}],
    "blank lines": "\n\n  {% if true %}\n  a\n  {% endif %}\n\n{{ messages[0]['content'] }}\n\n",
}
INSTRUCTIONS = ["Wo ist der Hund?", " a <b> & \"c\" 'd'\n\n{{ 7 }} {% if %} ", "猫 \u2028 😀 \x01 <s> </s>", ""]

OFTEN = "{% for i in range(99999) %}" * 3 + "BODY" + "{% endfor %}" * 3
GROW = "{% set ns = namespace(x=['a'], y=['a']) %}{% for i in range(99) %}BODY{% endfor %}"
HOSTILE = {
    "an endless loop": OFTEN,
    "an endless text": OFTEN.replace("BODY", "{{ i }}"),
    "a text of gigabytes": "{{ 'a' * 10 ** 10 }}",
    "a long text": "{{ 'a' * 2 ** 22 }}",
    "a longer text": "{{ 'a' * 2 ** 24 }}",
    "a long range": "{% for i in range(10 ** 12) %}{% endfor %}",
    "lists in lists": GROW.replace("BODY", "{% set ns.x = [ns.x, ns.x] %}") + "{{ ns.x | tojson }}",
    "lists in lists compared": (
        GROW.replace("BODY", "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}") + "{{ ns.x == ns.y }}"
    ),
    "a whole number": "{{ (10 ** 6) ** (10 ** 7) }}",
    "whole numbers": "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "a list of characters": "{{ ('猫' * 33000000) | list | length }}",
    "a quadratic filter": "{% set x = range(99999) | list %}{{ x | select('in', x) | list | length }}",
    "a wide format": "{{ '%0999999999d' % 1 }}",
    "a wide indent": "{{ ('a\n' * 99999) | indent(99999) | length }}",
    "centred": "{{ 'a'.center(10 ** 10) | length }}",
    "a slow strip": "{{ ('a' * 9999999).strip('b' * 9999999 ~ 'a') }}",
    "a macro that calls itself": "{% macro m(x) %}{{ m([x, x]) ~ m([x]) }}{% endmacro %}{{ m(1) }}",
    "brackets": "{{" + "(" * 9999 + "1" + ")" * 9999 + "}}",
    "a constant": "{% if 'a' * 10 ** 9 ~ 'b' %}{{ 'é' * 10 ** 9 }}{% endif %}",
    "an exception": "{{ raise_exception('only\n\n system turns') }}",
    "no template": "{% if %}",
    "no default": {"a": "x", "b": "y"},
    "an attribute": "{{ messages.__class__.__mro__ }}{{ ''.__class__ }}{{ cycler.__init__.__globals__ }}{{ 1 / 0 }}",
}


@pytest.fixture(scope="module")
def tokenizer(llm_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(llm_folder)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_prompt_is_what_transformers_makes_of_it(tokenizer: Any, template: Any) -> None:
    tokenizer.chat_template = {one["name"]: one["template"] for one in template} if type(template) is list else template
    for instruction in INSTRUCTIONS:
        turns = [{"role": "user", "content": instruction}]
        theirs = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert chat_prompt(tokenizer, instruction) == theirs


def test_a_prompt_has_the_time_zone_of_its_asker(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from cappy.rendering.jobs import close_children

    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    close_children()
    tokenizer.chat_template = "{{ strftime_now('%H %d') }}"
    try:
        turns = [{"role": "user", "content": ""}]
        theirs = [tokenizer.apply_chat_template(turns, tokenize=False) for _ in range(2)]
        assert chat_prompt(tokenizer, "") in [theirs[0], tokenizer.apply_chat_template(turns, tokenize=False)]
    finally:
        monkeypatch.undo()
        time.tzset()
        close_children()


@pytest.mark.usefixtures("within")
@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_ends_in_one_line_that_names_the_folder(
    tokenizer: Any, template: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cappy.sampling.drawing.RenderJob", partial(RenderJob, seconds=0.5))
    tokenizer.chat_template = template
    with pytest.raises(FolderError, match="chat template") as caught:
        chat_prompt(tokenizer, "who")
    assert str(caught.value).startswith(f"{tokenizer.name_or_path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("within")
def test_an_llm_with_a_hostile_template_loads_and_is_refused_when_it_is_asked(
    causal_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "hostile"
    shutil.copytree(causal_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = HOSTILE["a text of gigabytes"]
    tokenizer.save_pretrained(folder)
    generator = Causal("hostile", open_model_folder(folder))
    with pytest.raises(FolderError, match=f"{folder}: .*chat template.*512 MiB"):
        generator.sample(["who"], [GREEDY], seed=0)
