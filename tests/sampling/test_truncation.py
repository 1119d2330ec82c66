"""Responses cut at the limit of tokens are known as such, counted and reported (field-faults D8, D8b)."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from chat_server import Model, serving
from transformers import AutoTokenizer
from wording import assert_names

from cappy.cli.outcome import cautions
from cappy.cli.steps import summary
from cappy.errors import ConfigError
from cappy.model_folder import open_model_folder
from cappy.records import Candidate, Instance, Manifest, read, write
from cappy.sampling.architectures import Causal, Seq2Seq
from cappy.sampling.drawing import Response, end_tokens
from cappy.sampling.generators import response_status
from cappy.sampling.local import LocalLLM
from cappy.sampling.step import SamplingConfig, run
from cappy.sampling.strategies import GREEDY, parse_strategy
from cappy.sampling.vllm_generator import VLLM

PROMPTS = ["the cat sat on the mat", "where is the dog", "one two three"]
END = 1


@pytest.fixture(scope="module", params=["causal", "seq2seq"])
def generator(request: pytest.FixtureRequest, causal_folder: Path, llm_folder: Path) -> LocalLLM:
    if request.param == "causal":
        return Causal("tiny", open_model_folder(causal_folder))
    return Seq2Seq("tiny", open_model_folder(llm_folder))


@pytest.mark.parametrize("limit", [1, 5, 40])
def test_a_response_is_truncated_exactly_where_no_end_token_came(generator: LocalLLM, limit: int) -> None:
    """D8b: also by beams, and in a batch whose rows end at different lengths."""
    decodings = [replace(one, max_new_tokens=limit) for one in parse_strategy("greedy+beam2+sampling8")]
    responses = [one for drawn in generator.respond(PROMPTS, decodings, seed=3) for own in drawn for one in own]
    candidates = [one for drawn in generator.sample(PROMPTS, decodings, seed=3) for one in drawn]
    for response, candidate in zip(responses, candidates, strict=True):
        ended = response.tokens[-1] == END
        assert ended or len(response.tokens) == limit
        assert candidate.status == ("empty" if not candidate.response else "ok" if ended else "truncated")
    statuses = {candidate.status for candidate in candidates}
    assert "truncated" in statuses
    assert limit < 40 or isinstance(generator, Causal) or "ok" in statuses


def test_a_response_whose_last_allowed_token_is_the_end_is_whole(generator: LocalLLM) -> None:
    word = generator.tokenizer("cat", add_special_tokens=False).input_ids
    for tokens, status in (((*word, END), "ok"), (tuple(word), "truncated"), ((END,), "empty"), ((), "empty")):
        result = generator._candidate(Response(tokens, -1.0), GREEDY, seed=0)
        assert (result.status, result.response) == (status, "" if status == "empty" else "cat")


def test_any_of_several_end_tokens_ends_a_response(causal_folder: Path, tmp_path: Path) -> None:
    """As of LLMs whose generation_config.json names the end of a turn beside the end of a text."""
    folder = tmp_path / "turns"
    shutil.copytree(causal_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turn = next(token for token in sorted(tokenizer.added_tokens_decoder) if token not in (END, 0))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [END, turn, 40]}))
    config = SimpleNamespace(eos_token_id=END, vocab_size=len(tokenizer))
    # 40 is a word of the vocabulary.
    assert end_tokens(tokenizer, config, folder) == [END, turn]
    generator = Causal("turns", open_model_folder(folder))
    word = generator.tokenizer("cat", add_special_tokens=False).input_ids
    assert generator._candidate(Response((*word, turn), -1.0), GREEDY, seed=0).status == "ok"
    assert generator._truncate_at_end(torch.tensor([[*word, turn, 7, END]])) == [(*word, turn)]


@pytest.mark.parametrize("values", ["[]", "{}", '{"eos_token_id": null}', '{"eos_token_id": [true, -1, "x", 2.5]}'])
def test_an_odd_generation_config_names_no_end(values: str, causal_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(values)
    tokenizer = AutoTokenizer.from_pretrained(causal_folder)
    config = SimpleNamespace(eos_token_id=END, vocab_size=len(tokenizer))
    assert end_tokens(tokenizer, config, tmp_path) == [END]


@pytest.mark.parametrize(("reason", "status"), [("stop", "ok"), ("length", "truncated"), (None, "ok")])
def test_vllm_says_why_a_response_ended(reason: str | None, status: str) -> None:
    engine = object.__new__(VLLM)
    engine.name, engine.revision = "vllm:x", "1"
    output = SimpleNamespace(text=" cat ", token_ids=[5, 6], cumulative_logprob=-1.0, finish_reason=reason)
    assert engine._candidate(output, GREEDY, 0).status == status


def test_a_blank_response_is_empty_whether_it_ended_or_not() -> None:
    assert response_status("", complete=False) == response_status("", complete=True) == "empty"


def test_sampling_counts_cut_responses_and_ends_with_the_remedy(tmp_path: Path, causal_folder: Path) -> None:
    """D8, D8b."""
    write(tmp_path / "in", [Instance(instance_id=str(n), instruction=f"say {n}", references=("x",)) for n in range(4)])
    config = SamplingConfig(
        source=tmp_path / "in",
        target=tmp_path / "out",
        generator=(str(causal_folder),),
        strategy="sampling8",
        max_new_tokens=3,
        work=tmp_path / "work",
    )
    manifest = run(config)
    cut = sum(one.status == "truncated" for instance in read(tmp_path / "out") for one in instance.candidates)
    assert manifest.metrics["truncated"] == cut > 20
    (line,) = manifest.facts["cautions"]
    share = f"{100 * cut / 32:.1f} %"
    assert_names(line, f"{cut} of 32", share, "--max-new-tokens 128", "--set sampling.max_new_tokens=128")
    assert summary(manifest, tmp_path / "out", 1.0).splitlines()[-1] == f"caution   {line}"
    # What it advises fits into the LLM's 256 positions; more does not, and the error names the flag.
    longer = replace(config, target=tmp_path / "longer", work=tmp_path / "longer.work", max_new_tokens=128)
    (again,) = run(longer).facts["cautions"]
    assert_names(again, "128 new tokens", "256 tokens", "another LLM")
    assert "--max-new-tokens" not in again
    with pytest.raises(ConfigError, match="0 tokens .*--max-new-tokens.*max_new_tokens"):
        run(replace(config, target=tmp_path / "most", work=tmp_path / "most.work", max_new_tokens=256))


def test_cut_answers_of_an_endpoint_are_said_as_those_of_a_local_llm(tmp_path: Path) -> None:
    """D8."""
    write(
        tmp_path / "in",
        [
            Instance(instance_id=str(n), instruction=f"{'long' if n < 2 else 'say'} {n}", references=("x",))
            for n in range(4)
        ],
    )
    with serving(Model()) as url:
        manifest = run(
            SamplingConfig(
                source=tmp_path / "in",
                target=tmp_path / "out",
                generator=(f"openai:m@{url}",),
                strategy="sampling2",
                max_new_tokens=700,
                work=tmp_path / "work",
            )
        )
    (line,) = manifest.facts["cautions"]
    assert_names(line, "4 of 8", "50.0 %", "700 new tokens", "--max-new-tokens 1400 ")


@pytest.mark.parametrize(("cut", "said"), [(0, False), (5, False), (6, True), (100, True)])
def test_a_share_of_cut_responses_above_a_twentieth_is_said(cut: int, said: bool) -> None:
    """D8: from the manifest alone, so for whichever generator, and for shards that were gathered."""
    config = {"decodings": [{"max_new_tokens": 64}, {"max_new_tokens": 600}]}
    manifest = Manifest(step="sampling", files=(), config=config, metrics={"sampled": 100, "truncated": cut})
    result = cautions(manifest)
    assert bool(result) == said
    assert not said or ("600 new tokens" in result[0] and "--max-new-tokens 1200 " in result[0])


def test_what_was_not_sampled_cannot_be_cut() -> None:
    manifest = Manifest(step="sampling", files=(), metrics={"instances": 3, "candidates": 9})
    assert cautions(manifest) == []


def test_a_response_that_was_cut_may_be_selected() -> None:
    assert Candidate(response="x", status="truncated").selectable
