"""The calls to vLLM's offline interface, against a stand-in that records them: vLLM itself needs a GPU."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from cappy.errors import ConfigError
from cappy.model_folder import open_model_folder
from cappy.sampling import load_generator
from cappy.sampling.step import SamplingConfig
from cappy.sampling.strategies import BEAM4, GREEDY, Decoding, parse_strategy
from cappy.sampling.vllm_generator import VLLM
from cappy.specs import parse_spec


class SamplingParams(SimpleNamespace):
    """What it was made with."""


class LLM:
    """Answers with as many numbered texts as it is asked for."""

    made: list[dict[str, Any]] = []  # noqa: RUF012
    asked: list[tuple[list[int], SamplingParams]] = []  # noqa: RUF012

    def __init__(self, **settings: Any) -> None:
        LLM.made.append(settings)
        self._folder = settings["model"]

    def get_tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self._folder)

    def generate(self, prompts: list[Any], params: list[SamplingParams], *, use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        LLM.asked += [(prompt["prompt_token_ids"], own) for prompt, own in zip(prompts, params, strict=True)]
        return [self._one(prompt["prompt_token_ids"], own) for prompt, own in zip(prompts, params, strict=True)]

    def _one(self, ids: list[int], own: SamplingParams) -> Any:
        texts = [f" {own.seed} {n} " for n in range(own.n)] if hasattr(own, "n") else []
        outputs = [SimpleNamespace(text=text, token_ids=[5, 6, 1], cumulative_logprob=-1.5) for text in texts]
        actual = [None, *({token: SimpleNamespace(logprob=-0.25), 3: None} for token in ids[1:])]
        return SimpleNamespace(outputs=outputs, prompt_logprobs=actual)


@pytest.fixture
def folder(llm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that says it is a Llama, and vLLM's stand-in."""
    made = tmp_path / "llama"
    shutil.copytree(llm_folder, made)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 330, "eos_token_id": [1, 2]}
    (made / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    LLM.made.clear()
    LLM.asked.clear()
    return made


def test_every_knob_is_stated_and_candidates_come_back_in_order(folder: Path) -> None:
    generator = load_generator(f"vllm:{folder}")
    assert isinstance(generator, VLLM)
    (made,) = LLM.made
    assert made["trust_remote_code"] is False
    assert made["load_format"] == "safetensors"
    assert made["generation_config"] == "vllm"
    decodings = parse_strategy("greedy+temperature0.7-topp0.9x2+topk40-minp0.1x3")
    drawn = generator.sample(["who", "where is the dog"], decodings, seed=4)
    names = ["greedy", *["temperature0.7-topp0.9"] * 2, *["topk40-minp0.1"] * 3]
    assert [[one.decoding for one in own] for own in drawn] == [names, names]
    knobs = [(p.n, p.temperature, p.top_p, p.top_k, p.min_p, p.max_tokens, p.logprobs) for _, p in LLM.asked]
    assert knobs == 2 * [(1, 0.0, 1.0, 0, 0.0, 64, 0), (2, 0.7, 0.9, 0, 0.0, 64, 0), (3, 1.0, 1.0, 40, 0.1, 64, 0)]
    assert all(p.repetition_penalty == 1 and p.stop_token_ids == [1, 2] for _, p in LLM.asked)
    for own, (_, greedy) in zip(drawn, LLM.asked[::3], strict=True):
        assert own[0].response == f"{greedy.seed} 0"
        assert (own[0].logprob_sum, own[0].logprob_mean, own[0].num_tokens) == (-1.5, -0.5, 3)
    assert all(1 not in ids for ids, _ in LLM.asked), "a prompt must not hold an end token"


def test_a_seed_belongs_to_its_instruction_and_decoding(folder: Path) -> None:
    generator = VLLM("tiny", open_model_folder(folder))
    decodings = parse_strategy("sampling2+topk4")
    generator.sample(["who", "where", "a"], decodings, seed=4)
    seeds = [own.seed for _, own in LLM.asked]
    assert len(set(seeds)) == 6
    generator.sample(["where"], [decodings[1]], seed=4)
    assert LLM.asked[-1][1].seed == seeds[3]
    generator.sample(["where"], [decodings[1]], seed=5)
    assert LLM.asked[-1][1].seed != seeds[3]


def test_likelihoods_come_from_the_prompts_own_tokens(folder: Path) -> None:
    result = VLLM("tiny", open_model_folder(folder)).likelihoods([("who", "no"), ("where is the dog", "")])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    counts = [len(tokenizer("no", add_special_tokens=False).input_ids) + 1, 1]
    assert result == [(-0.25 * count, count) for count in counts]
    assert all(own.prompt_logprobs == 0 and own.max_tokens == 1 for _, own in LLM.asked)
    assert LLM.asked[0][0] == [*tokenizer("who", add_special_tokens=False).input_ids, *tokenizer("no").input_ids]


def test_a_long_instruction_is_cut_and_counted(folder: Path) -> None:
    generator = VLLM("tiny", open_model_folder(folder))
    generator.sample(["where is the dog " * 60, "who"], [GREEDY], seed=0)
    assert generator.take_counts() == {"cut": 1}
    assert len(LLM.asked[0][0]) <= 128 - 64


def test_a_repository_is_named_by_its_commit(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "a" * 40
    snapshot = tmp_path / "models--org--name/snapshots" / commit
    shutil.copytree(folder, snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    generator = load_generator(f"vllm:hub:org/name@{commit}")
    assert (generator.name, generator.revision) == (f"vllm:hub:org/name@{commit}", commit)
    assert LLM.made[-1]["model"] == str(snapshot)


def test_lengths_and_the_engines_own_likelihood_are_asked_for(folder: Path) -> None:
    decoding = Decoding(name="long", min_new_tokens=3, max_new_tokens=9)
    VLLM("tiny", open_model_folder(folder)).sample(["who"], [decoding], seed=0)
    ((_, asked),) = LLM.asked
    assert (asked.min_tokens, asked.max_tokens) == (3, 9)
    # Before temperature and filters, as the candidates of other generators have it.
    assert LLM.made[-1]["logprobs_mode"] == "raw_logprobs"


def test_beams_are_refused_before_anything_is_loaded(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"vLLM.*beam4.*--strategy"):
        SamplingConfig(source=folder, target=folder, generator=(f"vllm:{folder}",), strategy="paper17")
    assert LLM.made == []
    (folder / "s.json").write_text(
        json.dumps([{"name": "b", "do_sample": False, "num_beams": 2, "generator": 0}, {"name": "s", "generator": 1}])
    )
    # Beams that are another generator's to draw are no reason.
    both = ("builtin", f"vllm:{folder}")
    SamplingConfig(source=folder, target=folder, generator=both, strategy=str(folder / "s.json"))
    with pytest.raises(ConfigError, match=r"vLLM.*\(b\)"):
        SamplingConfig(source=folder, target=folder, generator=both[::-1], strategy=str(folder / "s.json"))
    with pytest.raises(ConfigError, match="vLLM.*beam4"):
        VLLM("tiny", open_model_folder(folder)).sample(["who"], [BEAM4], seed=0)
    assert LLM.asked == []


def test_what_vllm_cannot_be_given_is_refused_with_a_remedy(
    llm_folder: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="encoder-decoder.*vllm:"):
        load_generator(f"vllm:{llm_folder}")
    for text in ("vllm:", "vllm:builtin", "vllm:vllm:x", "vllm:openai:m@http://h/v1"):
        with pytest.raises(ConfigError, match="vllm:folder.*vllm:hub:org/name@revision"):
            parse_spec(text)
    assert parse_spec("vllm:hub:a/b@0123456").name == "hub:a/b@0123456"
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match="pip install vllm"):
        VLLM("tiny", open_model_folder(folder))
