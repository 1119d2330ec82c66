"""Samples of a real encoder-decoder: nothing leaks in, likelihoods are the model's own."""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from cappy.errors import ConfigError, FolderError
from cappy.model_folder import open_model_folder
from cappy.sampling import load_generator
from cappy.sampling.architectures import Seq2Seq
from cappy.sampling.local import batch_by_length
from cappy.sampling.strategies import BEAM4, GREEDY, STRATEGIES, Decoding

PROMPTS = ["the cat sat on the mat", "where is the dog", "one two three"]
SAMPLING = Decoding(name="sampling", num_samples=4, max_new_tokens=8)


@pytest.fixture(scope="module")
def generator(llm_folder: Path) -> Seq2Seq:
    return Seq2Seq("tiny", open_model_folder(llm_folder))


def test_equal_arguments_draw_equal_candidates(generator: Seq2Seq) -> None:
    first = generator.sample(PROMPTS, [SAMPLING], seed=3)
    assert first == generator.sample(PROMPTS, [SAMPLING], seed=3)
    assert first != generator.sample(PROMPTS, [SAMPLING], seed=4)


def test_every_instruction_gets_its_number_of_candidates(generator: Seq2Seq) -> None:
    assert [len(drawn) for drawn in generator.sample(PROMPTS, [SAMPLING], seed=0)] == [4, 4, 4]
    assert [len(drawn) for drawn in generator.sample(PROMPTS, [BEAM4], seed=0)] == [1, 1, 1]


def test_greedy_is_the_models_own_greedy(generator: Seq2Seq, llm_folder: Path) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(llm_folder)
    tokenizer = AutoTokenizer.from_pretrained(llm_folder)
    for prompt, drawn in zip(PROMPTS, generator.sample(PROMPTS, [GREEDY], seed=0), strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(
            **inputs, do_sample=False, top_k=None, temperature=None, max_new_tokens=GREEDY.max_new_tokens
        )
        assert drawn[0].response == tokenizer.decode(ids[0], skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def careless(llm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model twice: with a generation config that changes everything it can, and without one."""
    folder = tmp_path_factory.mktemp("careless")
    bare, own = folder / "bare", folder / "own"
    for copy in (bare, own):
        shutil.copytree(llm_folder, copy)
    (bare / "generation_config.json").unlink()
    knobs = {
        "do_sample": True, "top_k": 50, "temperature": 0.1, "repetition_penalty": 1.9, "no_repeat_ngram_size": 1,
        "forced_bos_token_id": 7, "forced_eos_token_id": 9, "suppress_tokens": [20, 21], "length_penalty": 3.0,
        "min_length": 5, "bad_words_ids": [[30]], "early_stopping": True, "eos_token_id": 40, "num_beams": 3,
    }  # fmt: skip
    (own / "generation_config.json").write_text(json.dumps(knobs))
    return bare, own


def test_nothing_of_the_models_generation_config_leaks_in(careless: tuple[Path, Path]) -> None:
    bare, own = (Seq2Seq("tiny", open_model_folder(folder)) for folder in careless)
    decodings = [*STRATEGIES["paper17"], GREEDY]
    assert own.respond(PROMPTS, decodings, seed=1) == bare.respond(PROMPTS, decodings, seed=1)


def test_a_beam_search_is_what_we_state_and_the_librarys_defaults(careless: tuple[Path, Path]) -> None:
    """What generate() works with, after it has filled what a call left open."""
    model = Seq2Seq("tiny", open_model_folder(careless[1]))
    stated = {
        "do_sample": False, "num_beams": 4, "num_return_sequences": 1, "max_new_tokens": 64,
        "decoder_start_token_id": 0, "eos_token_id": [1], "pad_token_id": 0,
    }  # fmt: skip
    inner: Any = model.model
    used, _ = inner._prepare_generation_config(model.generation_config(BEAM4))
    fresh = GenerationConfig()
    fresh.update(**GenerationConfig._get_default_generation_params(), defaults_only=True)
    assert used.to_dict() == fresh.to_dict() | stated


def test_the_whole_vocabulary_is_drawn_from(generator: Seq2Seq) -> None:
    one_token = Decoding(name="sampling", num_samples=400, max_new_tokens=1)
    drawn = generator.sample(PROMPTS[:1], [one_token], seed=0)[0]
    assert len(Counter(round(c.logprob_sum or 0, 5) for c in drawn)) > 50


@cache
def plain_model(folder: Path) -> Any:
    return AutoModelForSeq2SeqLM.from_pretrained(folder).eval()


def plain_likelihood(folder: Path, instruction: str, response: Sequence[int]) -> float:
    """One pair alone, through the library's own labels."""
    model = plain_model(folder)
    ids = AutoTokenizer.from_pretrained(folder)(instruction, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(input_ids=ids, labels=torch.tensor([response])).logits
    return float(logits.log_softmax(-1)[0, range(len(response)), response].sum())


def test_every_candidate_is_as_likely_as_in_a_forward_pass(generator: Seq2Seq, llm_folder: Path) -> None:
    decodings = [replace(one, max_new_tokens=12) for one in STRATEGIES["paper17"]]
    responses = generator.respond(PROMPTS, decodings, seed=1)
    candidates = generator.sample(PROMPTS, decodings, seed=1)
    lengths = set()
    for prompt, drawn, actual in zip(PROMPTS, responses, candidates, strict=True):
        for response, candidate in zip([one for own in drawn for one in own], actual, strict=True):
            expected = plain_likelihood(llm_folder, prompt, response.tokens)
            assert candidate.logprob_sum == pytest.approx(expected, abs=1e-4)
            assert candidate.logprob_mean == pytest.approx(expected / len(response.tokens), abs=1e-4)
            assert 1 not in response.tokens[:-1]
            assert response.tokens[-1] == 1 or len(response.tokens) == 12
            lengths.add(len(response.tokens))
    assert len(lengths) > 1, "some must have ended early"


@pytest.mark.parametrize(
    "decoding", [GREEDY, BEAM4, Decoding(name="beam3", do_sample=False, num_beams=3, num_samples=2)]
)
def test_greedy_and_beams_are_those_of_generate_on_each_instruction_alone(
    generator: Seq2Seq, llm_folder: Path, decoding: Decoding
) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(llm_folder).eval()
    model.generation_config = GenerationConfig()
    tokenizer = AutoTokenizer.from_pretrained(llm_folder)
    prompts = [*PROMPTS, "no " * 40, "a", "the bird flew in a tree " * 3]
    for prompt, (drawn,) in zip(prompts, generator.respond(prompts, [decoding], seed=0), strict=True):
        result = model.generate(
            **tokenizer(prompt, return_tensors="pt"), do_sample=False, num_beams=decoding.num_beams,
            num_return_sequences=decoding.num_samples, max_new_tokens=64, eos_token_id=1, pad_token_id=0,
            decoder_start_token_id=0,
        )  # fmt: skip
        expected = [row[1 : row.index(1) + 1 if 1 in row else None] for row in result.tolist()]
        assert [list(response.tokens) for response in drawn] == expected


def test_draws_do_not_depend_on_what_else_is_asked_for(generator: Seq2Seq) -> None:
    decodings = STRATEGIES["paper17"]
    together = generator.respond(PROMPTS, decodings, seed=5)
    for number, prompt in enumerate(PROMPTS):
        for place, decoding in enumerate(decodings):
            ((alone,),) = generator.respond([prompt], [decoding], seed=5)
            assert [one.tokens for one in alone] == [one.tokens for one in together[number][place]]


def test_the_encoder_runs_once_for_an_instruction(generator: Seq2Seq) -> None:
    seen: list[int] = []
    encoder: Any = generator.model.get_encoder()
    hook = encoder.register_forward_hook(lambda _, __, output: seen.append(len(output[0])))
    try:
        generator.sample(PROMPTS, STRATEGIES["paper17"], seed=0)
        assert sum(seen) == len(PROMPTS)
        seen.clear()
        generator.likelihoods([(PROMPTS[0], "yes"), (PROMPTS[0], "no"), (PROMPTS[1], "red")])
        assert sum(seen) == 2
    finally:
        hook.remove()


def test_no_end_token_comes_before_its_time_and_likelihoods_stay_the_models_own(
    generator: Seq2Seq, llm_folder: Path
) -> None:
    decoding = Decoding(name="long", num_samples=200, min_new_tokens=6, max_new_tokens=8)
    (((drawn),),) = generator.respond(PROMPTS[:1], [decoding], seed=0)
    assert {len(response.tokens) for response in drawn} <= {7, 8}
    for response in drawn[:5]:
        expected = plain_likelihood(llm_folder, PROMPTS[0], response.tokens)
        assert response.logprob_sum == pytest.approx(expected, abs=1e-4)


def test_an_instruction_that_loses_its_end_is_counted_once(llm_folder: Path) -> None:
    generator = Seq2Seq("tiny", open_model_folder(llm_folder))
    long = "where is the dog " * 300
    generator.sample([long, "who"], [GREEDY, SAMPLING], seed=0)
    assert generator.take_counts() == {"cut": 1}
    generator.likelihoods([(long, "yes"), (long, "no"), ("who", "no")])
    assert generator.take_counts() == {"cut": 1}


def test_batches_hold_their_budget_and_every_place_once() -> None:
    lengths = [5, 900, 17, 3, 3, 64, 40]
    made = list(batch_by_length(lengths, reserved=10, budget=200))
    assert sorted(place for batch in made for place in batch) == list(range(7))
    assert all(len(batch) == 1 or len(batch) * (max(lengths[i] for i in batch) + 10) <= 200 for batch in made)


def test_a_given_response_is_as_likely_as_in_a_forward_pass_end_token_included(
    generator: Seq2Seq, llm_folder: Path
) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(llm_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(llm_folder)
    pairs = [("the cat sat", "on the mat"), ("who", "a dog and a bird"), ("one two three", "")]
    for (instruction, response), (total, count) in zip(pairs, generator.likelihoods(pairs), strict=True):
        labels = tokenizer(response, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(**tokenizer(instruction, return_tensors="pt"), labels=labels).logits
        expected = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).sum().item()
        assert count == labels.shape[1]
        assert total == pytest.approx(expected, abs=1e-4)


def test_likelihood_does_not_depend_on_the_batch(generator: Seq2Seq) -> None:
    alone = [generator.sample([prompt], [GREEDY], seed=0)[0][0] for prompt in PROMPTS]
    together = [drawn[0] for drawn in generator.sample(PROMPTS, [GREEDY], seed=0)]
    for one, other in zip(alone, together, strict=True):
        assert one.response == other.response
        assert one.logprob_sum == pytest.approx(other.logprob_sum, abs=1e-4)


def test_a_repository_is_loaded_at_its_commit_and_named_by_it(
    llm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the hub's own cache on disk, where another commit is the newest."""
    pinned, newer = "a" * 40, "b" * 40
    repository = tmp_path / "models--org--name"
    shutil.copytree(llm_folder, repository / "snapshots" / pinned)
    (repository / "snapshots" / newer).mkdir()
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(newer)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (drawn,) = load_generator(f"hub:org/name@{pinned}").sample(PROMPTS[:1], [SAMPLING], seed=0)
    assert {(one.generator, one.revision) for one in drawn} == {(f"hub:org/name@{pinned}", pinned)}
    with pytest.raises(ConfigError, match="hub.*revision"):
        load_generator(f"hub:org/name@{'c' * 40}")


def test_what_is_no_generator_is_refused_with_a_remedy(tmp_path: Path, scorer_folder: Path) -> None:
    with pytest.raises(FolderError, match="config.json"):
        load_generator(str(tmp_path))
    with pytest.raises(ConfigError, match="RobertaForSequenceClassification"):
        load_generator(str(scorer_folder))
    with pytest.raises(ConfigError, match="models:/cappy@champion.*openai:"):
        load_generator("models:/cappy@champion")


def test_a_folder_without_safetensors_or_with_damage_is_refused_in_one_line(llm_folder: Path, tmp_path: Path) -> None:
    without, damaged, foreign = tmp_path / "without", tmp_path / "damaged", tmp_path / "foreign"
    for copy in (without, damaged, foreign):
        shutil.copytree(llm_folder, copy)
    (without / "model.safetensors").unlink()
    (damaged / "tokenizer.json").write_text("{")
    config = json.loads((foreign / "config.json").read_text())
    code = {"AutoConfig": "evil.Config"}
    (foreign / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": code}))
    (foreign / "evil.py").write_text("raise SystemExit('code of a folder was run')")
    for folder, said in ((without, "model.safetensors"), (damaged, "tokenizer"), (foreign, "auto_map|evil.py")):
        with pytest.raises(FolderError, match=said) as error:
            load_generator(str(folder))
        assert "\n" not in str(error.value)
