"""Samples of a real causal LLM: the prompt is encoded once, likelihoods are the model's own."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from cappy.errors import ConfigError
from cappy.model_folder import open_model_folder
from cappy.sampling import load_generator
from cappy.sampling.architectures import Causal
from cappy.sampling.strategies import BEAM4, GREEDY, STRATEGIES, Decoding, parse_strategy

PROMPTS = ["the cat sat on the mat", "where is the dog", "one two three", "a", "no " * 25]
CONTEXT = 128
CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)
KNOBS = {
    "do_sample": True, "top_k": 50, "temperature": 0.1, "repetition_penalty": 1.9, "no_repeat_ngram_size": 1,
    "forced_bos_token_id": 7, "forced_eos_token_id": 9, "suppress_tokens": [20, 21], "num_beams": 3,
}  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, llm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of two layers, with positions that turn (Llama) or are looked up (GPT-2)."""
    made = tmp_path_factory.mktemp(request.param)
    tokenizer = AutoTokenizer.from_pretrained(llm_folder)
    tokenizer.save_pretrained(made)
    torch.manual_seed(0)
    size = len(tokenizer)
    model = (
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.3, bos_token_id=3,
                eos_token_id=1, pad_token_id=0,
            )
        )
        if request.param == "llama"
        else GPT2LMHeadModel(
            GPT2Config(
                vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, initializer_range=0.3,
                bos_token_id=3, eos_token_id=1, pad_token_id=0,
            )
        )
    )  # fmt: skip
    model.save_pretrained(made)
    (made / "generation_config.json").write_text(json.dumps(KNOBS))
    return made


@pytest.fixture(scope="module")
def generator(folder: Path) -> Causal:
    made = load_generator(str(folder))
    assert isinstance(made, Causal)
    return made


def prompt_ids(folder: Path, instruction: str) -> list[int]:
    ids: list[int] = AutoTokenizer.from_pretrained(folder)(instruction, add_special_tokens=False).input_ids
    return ids


@cache
def plain_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def plain_likelihood(folder: Path, prompt: Sequence[int], response: Sequence[int]) -> float:
    """One pair alone, in one plain pass."""
    model = plain_model(folder)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1)[range(len(response)), response].sum())


def test_every_candidate_is_as_likely_as_in_a_forward_pass(generator: Causal, folder: Path) -> None:
    decodings = [replace(one, max_new_tokens=12) for one in STRATEGIES["paper17"]]
    for instruction, drawn in zip(PROMPTS, generator.respond(PROMPTS, decodings, seed=1), strict=True):
        assert sum(map(len, drawn)) == 17
        for response in (one for own in drawn for one in own):
            expected = plain_likelihood(folder, prompt_ids(folder, instruction), response.tokens)
            assert response.logprob_sum == pytest.approx(expected, abs=1e-4)


def test_a_given_response_is_as_likely_as_in_a_forward_pass_end_token_included(generator: Causal, folder: Path) -> None:
    pairs = [("the cat sat", "on the mat"), ("who", "a dog and a bird"), ("one two three", ""), ("who", "no")]
    for (instruction, response), (total, count) in zip(pairs, generator.likelihoods(pairs), strict=True):
        given = [*prompt_ids(folder, response), 1]
        assert count == len(given)
        assert total == pytest.approx(plain_likelihood(folder, prompt_ids(folder, instruction), given), abs=1e-4)


@pytest.mark.parametrize("decoding", [GREEDY, BEAM4, replace(BEAM4, num_samples=2)])
def test_greedy_and_beams_are_those_of_generate_on_each_instruction_alone(
    generator: Causal, folder: Path, decoding: Decoding
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.generation_config = GenerationConfig()
    for instruction, (drawn,) in zip(PROMPTS, generator.respond(PROMPTS, [decoding], seed=0), strict=True):
        ids = torch.tensor([prompt_ids(folder, instruction)])
        result = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=decoding.num_beams,
            num_return_sequences=decoding.num_samples, max_new_tokens=64, eos_token_id=1, pad_token_id=0,
        )[:, ids.shape[1] :]  # fmt: skip
        expected = [row[: row.index(1) + 1 if 1 in row else None] for row in result.tolist()]
        assert [list(response.tokens) for response in drawn] == expected


def test_nothing_of_the_models_generation_config_leaks_in(generator: Causal, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "bare")
    (tmp_path / "bare/generation_config.json").unlink()
    bare = Causal("bare", open_model_folder(tmp_path / "bare"))
    decodings = parse_strategy("paper17+greedy")
    assert generator.respond(PROMPTS, decodings, seed=2) == bare.respond(PROMPTS, decodings, seed=2)


def test_draws_do_not_depend_on_what_else_is_asked_for(generator: Causal) -> None:
    decodings = parse_strategy("greedy+sampling3+minp0.1x2")
    together = generator.respond(PROMPTS, decodings, seed=5)
    for number, instruction in enumerate(PROMPTS):
        (alone,) = generator.respond([instruction], decodings[1:2], seed=5)
        assert [one.tokens for one in alone[0]] == [one.tokens for one in together[number][1]]


def test_a_prompt_is_encoded_once_for_all_its_samples(generator: Causal) -> None:
    seen: list[tuple[int, ...]] = []
    model: Any = generator.model
    hook = model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"].shape), with_kwargs=True)
    try:
        generator.sample(PROMPTS[:2], parse_strategy("greedy+sampling4+topk5x3"), seed=0)
    finally:
        hook.remove()
    assert seen[0][0] == 2
    assert seen[0][1] > 1
    assert {length for _, length in seen[1:]} == {1}
    assert seen[1][0] <= 16


def test_a_chat_template_is_used_where_there_is_one_and_never_cut(folder: Path, tmp_path: Path) -> None:
    chat = tmp_path / "chat"
    shutil.copytree(folder, chat)
    tokenizer = AutoTokenizer.from_pretrained(chat)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(chat)
    generator = Causal("chat", open_model_folder(chat))
    long = "where is the dog " * 60
    short, cut = generator._prompts(["who", long], 64)
    assert short == tokenizer("<s>user: who\n<s>", add_special_tokens=False).input_ids
    text = tokenizer.decode(cut)
    assert text.startswith("<s>user: where is")
    assert text.endswith("<s>")
    assert len(cut) <= CONTEXT - 64
    assert generator.take_counts() == {"cut": 1}


def test_an_instruction_that_is_too_long_loses_its_end_and_is_counted(folder: Path) -> None:
    generator = Causal("tiny", open_model_folder(folder))
    long = "where is the dog " * 60
    (drawn, _) = generator.sample([long, "who"], [GREEDY], seed=0)
    assert drawn[0].num_tokens
    assert generator.take_counts() == {"cut": 1}
    with pytest.raises(ConfigError, match="0 tokens.*--max-new-tokens"):
        generator.sample([long], [Decoding(name="long", max_new_tokens=CONTEXT)], seed=0)
