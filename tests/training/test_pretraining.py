"""Pretraining a new encoder: of any width, and as JSON for a program to read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cappy.builtin import LLM_FOLDER
from cappy.errors import ConfigError
from cappy.training.pretraining import PretrainingConfig, new_encoder


def test_a_narrow_new_encoder_is_trained_and_reported_as_json_alone(source: Path, tmp_path: Path) -> None:
    places = ("--source", source, "--target", tmp_path / "scorer", "--work", tmp_path / "work")
    shape = ("--hidden-size", "64", "--layers", "1", "--train-rows", "64", "--json")
    command = [str(Path(sys.executable).with_name("cappy")), "pretraining", *map(str, places), *shape]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["config"]["hidden_size"] == 64
    assert json.loads((tmp_path / "scorer/config.json").read_text())["hidden_size"] == 64


def test_a_new_encoder_of_any_width_starts_from_words_that_the_llm_has_near_each_other() -> None:
    from safetensors.torch import load_file

    known = load_file(LLM_FOLDER / "model.safetensors")["shared.weight"].float()
    known = torch.nn.functional.normalize(known - known.mean(0), dim=1)
    near = (known @ known.T - 2 * torch.eye(len(known))).max(dim=1)
    chosen = near.values.topk(100).indices
    for width in (96, 160, 320):
        torch.manual_seed(0)
        words = new_encoder(1, width, 64)[0].bert.embeddings.word_embeddings.weight.detach()[: len(known)]
        words = torch.nn.functional.normalize(words - words.mean(0), dim=1)
        assert (words[chosen] * words[near.indices[chosen]]).sum(dim=1).mean() == pytest.approx(
            float(near.values[chosen].mean()), abs=0.1
        )


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises((ConfigError, ValueError), match="multiple of 32"):
        PretrainingConfig(source=Path("a"), target=Path("b"), hidden_size=100)
