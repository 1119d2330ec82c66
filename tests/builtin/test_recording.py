"""The commands that record samples of an LLM and draw prompts of T0's mixture: `python -m cappy.builtin`."""

import gzip
import json
import lzma
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cappy.builtin import LLM_FOLDER, __main__
from cappy.sampling.recorded_rows import read_file

FAMILIES = ("word_sorting", "date_formats")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["cappy.builtin", *map(str, arguments)])
    __main__.main()


def write_rows(path: Path, rows: list[Mapping[str, object]]) -> Path:
    text = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    path.write_bytes(lzma.compress(text) if path.suffix == ".xz" else gzip.compress(text))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def test_samples_are_recorded_once_for_each_prompt_and_are_read_as_they_were_drawn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    questions = [{"question": f"What is {n} and 1?", "answer": f"It is {n + 1}.\n#### 1,{n + 101}"} for n in range(9)]
    gsm8k = write_rows(tmp_path / "gsm8k.gz", [*questions])
    sentences = [
        {"concepts": [f"dog {n}", "cat"], "target": f"Dog {n} {verb} a cat."} for n in range(9) for verb in "ab"
    ]
    commongen = write_rows(tmp_path / "commongen.gz", [*sentences, {"concepts": ["one"], "target": "One."}])
    monkeypatch.setattr(__main__, "_RECORDED_FAMILIES", FAMILIES)
    monkeypatch.setattr(__main__, "_RECORDED_FILES", {"demo": 2, "more": 1})
    options = ("--llm", LLM_FOLDER, "--name", "tiny", "--gsm8k", gsm8k, "--commongen", commongen)
    run(monkeypatch, "samples", "--target", tmp_path / "a", "--work", tmp_path / "work", *options)
    demo, more = (read_rows(tmp_path / f"a/{name}.jsonl.gz") for name in ("demo", "more"))
    assert Counter(row["task"] for row in demo) == {"word_sorting": 2, "date_formats": 2, "gsm8k": 4, "commongen": 4}
    assert len({row["instruction"] for row in (*demo, *more)}) == len(demo) + len(more) == 18
    assert {tuple(row["references"]) for row in demo if row["task"] == "gsm8k"} <= {(f"1{n}",) for n in range(101, 110)}
    samples = list(read_file(tmp_path / "a/demo.jsonl.gz"))
    assert Counter((each.candidate.generator, each.candidate.decoding) for each in samples) == {
        ("tiny", "greedy"): 12,
        ("tiny", "topp0.95"): 84,
    }
    assert all(each.candidate.logprob_sum is not None and each.candidate.num_tokens for each in samples)
    with monkeypatch.context() as patch:
        patch.setattr("cappy.sampling.generators.LocalGenerator.sample", None)
        run(patch, "samples", "--target", tmp_path / "b", "--work", tmp_path / "work", *options)
    assert (tmp_path / "b/demo.jsonl.gz").read_bytes() == (tmp_path / "a/demo.jsonl.gz").read_bytes()
    run(monkeypatch, "samples", "--target", tmp_path / "b", "--work", tmp_path / "again", *options)
    assert (tmp_path / "b/demo.jsonl.gz").read_bytes() == (tmp_path / "a/demo.jsonl.gz").read_bytes()


def test_prompts_are_drawn_evenly_and_leave_out_what_tests_use_or_what_is_skewed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def row(dataset: str, number: int, choices: list[str] | None = None, words: int = 3) -> dict[str, object]:
        text = f"{dataset} {number} " + "word " * words
        return {
            "dataset": dataset,
            "template": "t",
            "row": number,
            "instruction": text,
            "response": "yes",
            "answer_choices": choices,
        }

    rows = [row("large", n, ["yes", "no"]) for n in range(50)] + [row("small", n, ["yes", "no"]) for n in range(3)]
    rows += [row("imdb", n, ["yes", "no"]) for n in range(9)] + [row("imdb", n, ["good", "bad"]) for n in range(9)]
    rows += [row("common_gen", n) for n in range(9)]
    rows += [row("text", 1), row("text", 2, words=500), row("text", 3, ["no", "maybe"])]
    source = write_rows(tmp_path / "t0.jsonl.xz", [*rows])
    for name in ("a", "b"):
        run(monkeypatch, "prompts", "--t0", source, "--target", tmp_path / name, "--choice", 10, "--generation", 10)
    drawn = [json.loads(line) for line in (tmp_path / "a").read_text().splitlines()]
    assert "has only 12 prompts" in capsys.readouterr().err
    assert Counter((each["task"], bool(each["choices"])) for each in drawn) == {
        ("large", True): 7,
        ("small", True): 3,
        ("text", False): 2,
    }
    assert len({each["group_id"] for each in drawn}) == len(drawn)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
