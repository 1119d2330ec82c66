"""The loop learns, resumes exactly, and keeps the best."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from wording import raises_naming

from cappy.errors import ConfigError
from cappy.records import Instance, prompt_hash, read_manifest, write
from cappy.records.folder import verify
from cappy.scoring import Scorer, training_prompts
from cappy.scoring.training_data import training_data
from cappy.training.finetuning import FinetuningConfig, run
from cappy.training.update import default_learning_rate, learning_rate

Plan = Callable[..., FinetuningConfig]


class KilledError(Exception):
    """Stands for a kill at some update."""


def test_a_killed_run_continues_and_ends_with_the_same_weights(plan: Plan) -> None:
    unbroken = run(plan("a"))
    seen: list[int] = []

    def killed_after_four(
        done: int, total: int | None = None, *, unit: str = "", resumed: int = 0, note: str = ""
    ) -> None:
        if done == 4:
            raise KilledError

    def remember(done: int, total: int | None = None, *, unit: str = "", resumed: int = 0, note: str = "") -> None:
        seen.append(done)

    with pytest.raises(KilledError):
        run(plan("b"), killed_after_four)
    assert not plan("b").target.exists()
    resumed = run(plan("b"), remember)
    assert seen[0] == 5, "updates before the checkpoint are not done again"
    first, second = (load_file(plan(side).target / "model.safetensors") for side in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert resumed.hash == unbroken.hash


def test_training_learns_and_keeps_a_check_that_is_not_clearly_below_the_best(plan: Plan) -> None:
    manifest = run(plan(epochs=30.0, checks=10, patience=10, checkpoint_updates=None))
    log = json.loads((plan().target / "training.json").read_text())
    assert log["curve"][-1]["loss"] < log["curve"][1]["loss"]
    kept = next(entry for entry in log["checks"] if entry["update"] == manifest.metrics["best_update"])
    assert manifest.metrics["validation_pick"] == pytest.approx(kept["pick"], abs=1e-6)
    assert kept["behind"] <= max(kept["error"], 0.001)
    assert manifest.metrics["validation_pick"] > 0.25, "chance is 1 in 4"


def test_the_folder_is_finished_names_its_parents_and_its_prompts(plan: Plan, instances: list[Instance]) -> None:
    run(plan(epochs=0.2))
    manifest = verify(plan().target)
    assert manifest.parents == (read_manifest(plan().source).hash, read_manifest(plan().scorer).hash)
    hashes = set(training_prompts(plan().target).tolist())
    by_split = {
        split: {prompt_hash(i.instruction) for i in instances if i.split == split} for split in ("train", "test")
    }
    assert by_split["train"] <= hashes
    assert not by_split["test"] & hashes
    rows = training_data(plan().target).rows
    assert rows is not None
    assert rows.total_rows == sum(i.split != "test" for i in instances)
    assert Scorer.load(str(plan().target)).version == manifest.hash[:12]


def test_nothing_to_learn_from_is_said(plan: Plan, tmp_path: Path, instances: list[Instance]) -> None:
    write(tmp_path / "in", [i for i in instances if i.split == "test"])
    with raises_naming(ConfigError, str(tmp_path / "in"), "split train"):
        run(plan(source=tmp_path / "in"))


def test_how_ranks_are_spread_and_checkpointed_does_not_name_the_work(plan: Plan) -> None:
    from cappy.config import result_settings

    spread = plan(
        parallelism="deepspeed", devices=4, nodes=2, zero_stage=3, checkpoint_updates=7, checkpoint_seconds=1.0
    )
    assert result_settings(spread) == result_settings(plan())


def test_the_rate_rises_falls_and_is_counted_in_updates() -> None:
    rates = [learning_rate(update, 100, 1.0, 0.1) for update in range(100)]
    assert rates[9] == 1.0 == max(rates)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 0.02
    assert default_learning_rate(1024) == pytest.approx(2e-5)
