"""Strategies by name, by grammar and by file; what is wrong is one line that says what there is."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cappy.errors import ConfigError
from cappy.sampling.strategies import BEAM4, GREEDY, STRATEGIES, Decoding, parse_strategy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("greedy", [GREEDY]),
        ("beam8", [Decoding(name="beam8", do_sample=False, num_beams=8)]),
        ("beam8x3", [Decoding(name="beam8", do_sample=False, num_beams=8, num_samples=3)]),
        ("sampling5", [Decoding(name="sampling", num_samples=5)]),
        ("temperature0.7x4", [Decoding(name="temperature0.7", num_samples=4, temperature=0.7)]),
        ("topk40", [Decoding(name="topk40", top_k=40)]),
        ("minp0.05x4", [Decoding(name="minp0.05", num_samples=4, min_p=0.05)]),
        ("beam4+topk40x4", [BEAM4, Decoding(name="topk40", num_samples=4, top_k=40)]),
        ("temperature2-topp0.9x2", [Decoding(name="temperature2-topp0.9", num_samples=2, temperature=2, top_p=0.9)]),
        ("paper17+minp0.1x2", [*STRATEGIES["paper17"], Decoding(name="minp0.1", num_samples=2, min_p=0.1)]),
    ],
)  # fmt: skip
def test_the_grammar_means_what_it_says(text: str, expected: list[Decoding]) -> None:
    assert list(parse_strategy(text)) == expected


def test_paper17_can_be_written_in_the_grammar() -> None:
    assert parse_strategy("beam4+sampling4+temperature0.9x4+topk40x4+topp0.95x4") == STRATEGIES["paper17"]


def test_the_leaky_scheme_differs_by_top_k_50_where_none_was_named_and_by_its_lengths() -> None:
    for honest, leaky in zip(STRATEGIES["paper17"], STRATEGIES["paper17-leaky"], strict=True):
        top_k = 40 if honest.name == "topk40" else 50 if honest.do_sample else 0
        named = replace(honest, name=f"{honest.name}-leaky", top_k=top_k, min_new_tokens=3, max_new_tokens=63)
        assert leaky == named


def test_the_pretraining_scheme_is_five_samples_of_each_of_two_generators() -> None:
    first, second = STRATEGIES["paper-pretrain"]
    assert (first.num_samples, first.top_k, first.generator) == (5, 40, 0)
    assert (second.num_samples, second.top_p, second.top_k, second.generator) == (5, 0.95, 0, 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("paper18", "'paper18'.*greedy, sampling8, paper17, .*beamN, samplingN"),
        ("beam4+what", "'what' in 'beam4\\+what'"),
        ("", "'' .*paper17"),
        ("topk1.5", "'topk1.5'"),
        ("topp0.9-topp0.8", "'topp0.9-topp0.8' .*paper17"),
        ("beam4x5", "num_samples .*num_beams"),
        ("sampling0", "num_samples must be 1 "),
        ("topp0", "top_p.* 0 "),
        ("topp1.5x4", "top_p.* 1"),
        ("temperature0x4", "temperature.* 0 "),
        ("sampling4+sampling2", "'sampling' .*twice"),
        ("missing.yaml", "missing.yaml: .*--strategy"),
    ],
)
def test_what_no_strategy_is_stands_in_one_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        parse_strategy(text)
    assert "\n" not in str(error.value)


def test_a_file_of_decodings_may_be_yaml_or_json(tmp_path: Path) -> None:
    knobs = {"name": "warm", "num_samples": 3, "temperature": 2, "min_p": 0.1, "max_new_tokens": 9}
    (tmp_path / "s.yaml").write_text(
        "- greedy\n- {name: warm, num_samples: 3, temperature: 2, min_p: 0.1, max_new_tokens: 9}\n"
    )
    (tmp_path / "s.json").write_text(json.dumps(["greedy", knobs]))
    expected = (GREEDY, Decoding(name="warm", num_samples=3, temperature=2, min_p=0.1, max_new_tokens=9))
    assert parse_strategy(str(tmp_path / "s.yaml")) == parse_strategy(str(tmp_path / "s.json")) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "YAML"),
        ("greedy", "list.*'greedy'"),
        ("[]", "list.*'\\[\\]'|list.*\\[\\]"),
        ("[7]", "decoding 1: .*topk40x4.* 7"),
        ("[greedy, what]", "decoding 2: .*'what'"),
        ("[{name: a, top_q: 1}]", "decoding 1: 'top_q' .*name, num_samples"),
        ("[{name: a, top_k: many}]", "decoding 1: top_k .*integer.*'many'"),
        ("[{name: a, top_k: true}]", "top_k .*integer.*True"),
        ("[{name: a, do_sample: 1}]", "do_sample .*true.*1"),
        ("[{name: a, top_p: .nan}]", "decoding 'a': top_p "),
        ("[{name: a, do_sample: false, top_k: 4}]", "top_k.*do_sample"),
        ("[{name: a, num_beams: 4}]", "num_beams.*do_sample"),
        ("[{name: a, min_new_tokens: 64}]", "min_new_tokens .*max_new_tokens"),
        ("[{name: ' '}]", "decoding 1: name "),
        ("[{name: 2020-13-45}]", "YAML"),
        ('[!!int ""]', "YAML"),
        ("[!!timestamp now]", "YAML"),
        ("[!!bool maybe]", "YAML"),
        ("[{name: a}, {name: a}]", "'a' .*twice"),
    ],
)
def test_a_wrong_file_names_itself_the_entry_the_knob_and_the_value(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as error:
        parse_strategy(str(path))
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
