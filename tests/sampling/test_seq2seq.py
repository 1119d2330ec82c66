"""Samples of a real encoder-decoder: nothing leaks in, likelihoods are the model's own."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from cappy.errors import ConfigError, FolderError
from cappy.sampling.generators import load_generator
from cappy.sampling.seq2seq import Seq2Seq
from cappy.sampling.strategies import BEAM4, GREEDY, Decoding

PROMPTS = ["the cat sat on the mat", "where is the dog", "one two three"]
SAMPLING = Decoding(name="sampling", num_samples=4, max_new_tokens=8)


@pytest.fixture(scope="module")
def generator(llm_folder: Path) -> Seq2Seq:
    return Seq2Seq("tiny", llm_folder)


def test_equal_arguments_draw_equal_candidates(generator: Seq2Seq) -> None:
    first = generator.sample(PROMPTS, SAMPLING, seed=3)
    assert first == generator.sample(PROMPTS, SAMPLING, seed=3)
    assert first != generator.sample(PROMPTS, SAMPLING, seed=4)


def test_every_instruction_gets_its_number_of_candidates(generator: Seq2Seq) -> None:
    assert [len(drawn) for drawn in generator.sample(PROMPTS, SAMPLING, seed=0)] == [4, 4, 4]
    assert [len(drawn) for drawn in generator.sample(PROMPTS, BEAM4, seed=0)] == [1, 1, 1]


def test_greedy_is_the_models_own_greedy(generator: Seq2Seq, llm_folder: Path) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(llm_folder)
    tokenizer = AutoTokenizer.from_pretrained(llm_folder)
    for prompt, drawn in zip(PROMPTS, generator.sample(PROMPTS, GREEDY, seed=0), strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(
            **inputs, do_sample=False, top_k=None, temperature=None, max_new_tokens=GREEDY.max_new_tokens
        )
        assert drawn[0].response == tokenizer.decode(ids[0], skip_special_tokens=True).strip()


def test_nothing_of_the_models_generation_config_leaks_in(generator: Seq2Seq) -> None:
    """The folder's config says top_k 50 and temperature 0.1; a plain sample must come from the whole vocabulary."""
    one_token = Decoding(name="sampling", num_samples=400, max_new_tokens=1)
    drawn = generator.sample(PROMPTS[:1], one_token, seed=0)[0]
    assert len(Counter(round(c.logprob_sum or 0, 5) for c in drawn)) > 50


def test_likelihood_is_the_forward_passs(generator: Seq2Seq, llm_folder: Path) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(llm_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(llm_folder)
    for prompt, drawn in zip(PROMPTS, generator.sample(PROMPTS, SAMPLING, seed=1), strict=True):
        for candidate in drawn:
            ids = tokenizer(candidate.response, add_special_tokens=False)["input_ids"]
            if len(ids) != candidate.num_tokens or not ids:
                continue  # ended early (the end token counts too) or re-tokenized otherwise
            with torch.no_grad():
                logits = model(**tokenizer(prompt, return_tensors="pt"), labels=torch.tensor([ids])).logits
            expected = logits.log_softmax(-1)[0, range(len(ids)), ids].sum().item()
            assert candidate.logprob_sum == pytest.approx(expected, abs=1e-4)
            assert candidate.logprob_mean == pytest.approx(expected / len(ids), abs=1e-4)


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
    alone = [generator.sample([prompt], GREEDY, seed=0)[0][0] for prompt in PROMPTS]
    together = [drawn[0] for drawn in generator.sample(PROMPTS, GREEDY, seed=0)]
    for one, other in zip(alone, together, strict=True):
        assert one.response == other.response
        assert one.logprob_sum == pytest.approx(other.logprob_sum, abs=1e-4)


def test_what_is_no_generator_is_refused_with_a_remedy(tmp_path: Path, scorer_folder: Path) -> None:
    with pytest.raises(FolderError, match="no config.json there"):
        load_generator(str(tmp_path))
    with pytest.raises(ConfigError, match="is not an encoder-decoder; serve it and name it as openai:"):
        load_generator(str(scorer_folder))
    with pytest.raises(ConfigError, match="the registry holds scorers"):
        load_generator("models:/cappy@champion")
