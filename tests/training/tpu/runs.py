"""The step with `--parallelism jax`: torch's loss curve, exact resuming, the same words when something is wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from waiting import wait_until
from wording import raises_naming

from cappy.config import build, encode, to_values
from cappy.errors import TrainingError
from cappy.records import Candidate, Instance, read_manifest, write
from cappy.records.folder import verify
from cappy.scoring import Scorer
from cappy.training.finetuning import FinetuningConfig
from cappy.training.finetuning import run as finetuning
from cappy.training.pretraining import PretrainingConfig
from cappy.training.pretraining import run as pretraining
from cappy.training.settings import TrainingSettings

Plan = Callable[..., FinetuningConfig]
CURVE = {"checks": 1000, "patience": 1000, "epochs": 1.4, "batch_instances": 8, "learning_rate": 1e-3}
"""A check after every update, so that the log is the loss curve; 11 updates."""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, instances: list[Instance]) -> Path:
    """The copy task, in which every instance has a mismatch too, which takes no part in comparisons."""
    planted = Candidate(response="nothing of this", source="mismatch", labels={"rougeL": 0.0})
    folder = tmp_path_factory.mktemp("mixed") / "annotated"
    write(folder, [replace(one, candidates=(*one.candidates, planted)) for one in instances])
    return folder


def curve(plan: TrainingSettings) -> list[float]:
    return [entry["loss"] for entry in json.loads((plan.target / "training.json").read_text())["curve"]]


def weights(plan: TrainingSettings) -> dict[str, torch.Tensor]:
    result: dict[str, torch.Tensor] = load_file(plan.target / "model.safetensors")
    return result


def furthest(first: TrainingSettings, second: TrainingSettings) -> float:
    one, two = weights(first), weights(second)
    assert one.keys() == two.keys()
    return max((one[name] - two[name]).abs().max().item() for name in one)


def test_without_dropout_the_loss_curve_is_torchs_on_one_device_and_on_eight(
    mixed: Path, bert_folder: Path, tmp_path: Path
) -> None:
    plans = {}
    for name, values in {"single": {}, "jax": {}, "eight": {"devices": 8}}.items():
        given = {"source": mixed, "target": tmp_path / name / "scorer", "work": tmp_path / name / "work", **values}
        own = {"parallelism": "single" if name == "single" else "jax", "encoder": str(bert_folder)}
        settings = {"max_length": 64, "batch_tokens": 2048, "listwise": 0.2, "weight_decay": 0.1}
        plans[name] = build(PretrainingConfig, {**given, **own, **settings, **CURVE})
        pretraining(plans[name])
    expected = curve(plans["single"])
    assert len(expected) == 11
    assert max(expected[1:]) - min(expected[1:]) > 0.01, "or there was nothing to compare"
    for name in ("jax", "eight"):
        worst = max(abs(mine - other) for mine, other in zip(curve(plans[name]), expected, strict=True))
        print(f"{name}: losses differ by at most {worst:.1e}")
        assert worst < 1e-4
        pairs = [("1 cat dog mat red", word) for word in ("red", "dog")]
        scores = [Scorer.load(str(plans[one].target), precision="fp32").score(pairs) for one in (name, "single")]
        assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    assert [file.name for file in verify(plans["jax"].target).files] == [
        file.name for file in verify(plans["single"].target).files
    ]


def killed_after(plan: FinetuningConfig, update: int) -> None:
    """The step in a process of its own, which must split the CPU by itself, killed once this update is kept."""
    flags = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)
    process = subprocess.Popen(
        [sys.executable, "-m", "cappy.training", "finetuning", encode(to_values(plan))],
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(Path(__file__).parents[3])},
        stderr=subprocess.PIPE,
        text=True,
    )
    place = f"finetuning/*/.checkpoints/{update:09d}"
    wait_until(lambda: list(plan.work.glob(place)), f"checkpoint {update}", seconds=200, pause=0.01, process=process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not plan.target.exists()


class Seen:
    """Progress that remembers the updates it was told of."""

    def __init__(self) -> None:
        self.updates: list[int] = []

    def __call__(
        self, done: int, total: int | None = None, *, unit: str = "", resumed: int = 0, note: str = ""
    ) -> None:
        self.updates.append(done)


def test_a_killed_run_goes_on_to_the_same_bits_and_torch_does_not_go_on_with_it(
    plan: Plan, instances: list[Instance], tmp_path: Path
) -> None:
    # Without validation instances the last weights are the best, whatever the picks.
    write(tmp_path / "annotated", [one for one in instances if one.split == "train"])
    settings = {"parallelism": "jax", "devices": 2, "source": tmp_path / "annotated", "batch_tokens": 2048, **CURVE}
    finetuning(plan("unbroken", **settings))
    killed_after(plan("killed", **settings), 5)
    shutil.copytree(plan("killed").work, plan("torch").work)
    seen = {name: Seen() for name in ("killed", "torch")}
    finetuning(plan("killed", **settings), seen["killed"])
    assert seen["killed"].updates[0] > 5, "updates before the checkpoint are not done again"
    assert furthest(plan("unbroken"), plan("killed")) == 0.0
    assert read_manifest(plan("unbroken").target).hash == read_manifest(plan("killed").target).hash
    finetuning(plan("torch", **{**settings, "parallelism": "single", "devices": 1}), seen["torch"])
    assert seen["torch"].updates[0] == 1
    assert read_manifest(plan("unbroken").target).config["parallelism"] == "jax"
    assert "parallelism" not in read_manifest(plan("torch").target).config


def test_a_loss_that_is_no_number_is_reported_in_torchs_words(plan: Plan, scorer_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(scorer_folder, tmp_path / "spoilt")
    (tmp_path / "spoilt" / "manifest.json").unlink()
    path = tmp_path / "spoilt" / "model.safetensors"
    tensors = load_file(path)
    tensors["classifier.out_proj.bias"][0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    said = []
    for parallelism in ("single", "jax"):
        with raises_naming(TrainingError, "update 1:", "loss", "nan", "instances", "checkpoint") as e:
            finetuning(plan("nan", parallelism=parallelism, scorer=str(tmp_path / "spoilt"), **CURVE))
        said.append(str(e.value))
    assert said[0] == said[1]


def test_a_loss_that_explodes_stops_the_run(plan: Plan) -> None:
    with raises_naming(TrainingError, "update ", "--learning-rate"):
        finetuning(plan("large", parallelism="jax", **{**CURVE, "learning_rate": 1e9}))
